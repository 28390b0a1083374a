"""Ray shell of a search service: one index in a process of its own, and how actors of the run reach it.

Vectors and passages are mapped from their files: the actors of a node share one copy in its memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from rexrag.errors import Overloaded, RexragError
from rexrag.processes import Share
from rexrag.reporting.log_file import log_process
from rexrag.retrieval.attempts import RetryableError
from rexrag.retrieval.folders import open_index
from rexrag.retrieval.service import SearchService
from rexrag.retrieval.settings import SearchActorSettings
from rexrag.types import Passage

MAX_CALLS: Final = 16384
"""Searches that one actor has in hand at once: more than all episodes of a large run."""


class SearchActor:
    """A `SearchService` in its own process. Ray starts it again when it dies."""

    def __init__(self, name: str, settings: SearchActorSettings) -> None:
        log_process(settings.log_file, part=name)
        self._opened: SearchService[Any] | RexragError
        try:
            index = open_index(
                settings.path,
                encoder=settings.encoder,
                gpu_share=settings.num_gpus,
                num_threads=settings.num_threads,
            )
            self._opened = SearchService(index)
        except RexragError as error:
            self._opened = error  # whoever asks is told: of an actor that cannot be made Ray tells a page

    async def ready(self) -> int:
        """The id of this process, once its index is open.

        Raises:
            UserError: it cannot be opened.
        """
        self._service()
        return os.getpid()

    async def search(self, query: str, top_k: int) -> tuple[Passage, ...]:
        """Errors are those of `ready` and of `SearchService.search`."""
        return tuple(await self._service().search(query, top_k=top_k))

    def _service(self) -> SearchService[Any]:
        if isinstance(self._opened, RexragError):
            raise self._opened
        return self._opened


def search_actor_name(number: int) -> str:
    """What the actors of a pool are called, within the namespace of their run."""
    return f"search-{number}"


def start_search_actor(number: int, settings: SearchActorSettings, *, share: Share) -> ActorHandle[SearchActor]:
    """A `SearchActor` in its own process; the actors of a pool lie on different nodes, where there are."""
    name = search_actor_name(number)
    remote = ray.remote(SearchActor).options(
        name=name, max_concurrency=MAX_CALLS, max_restarts=-1, scheduling_strategy="SPREAD", **share.options
    )
    return cast("ActorHandle[SearchActor]", remote.remote(name, settings))


def is_restarting(error: BaseException | None) -> bool:
    """Whether the actor that an error tells of is expected back."""
    return isinstance(error, ActorUnavailableError)


class RemoteMember:
    """A member of a pool, by its name: found when it is first asked."""

    def __init__(self, number: int) -> None:
        self._name = search_actor_name(number)
        self._handle: Any = None

    async def search(self, query: str, top_k: int) -> Sequence[Passage]:
        try:
            if self._handle is None:
                self._handle = ray.get_actor(self._name)
            found: Sequence[Passage] = await self._handle.search.remote(query, top_k)
            return found
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, Overloaded):
                raise RetryableError(str(cause), retry_after_s=cause.retry_after_s, is_busy=True) from None
            if isinstance(cause, RexragError):
                raise cause from None
            raise RetryableError(f"{self._name}: {cause!r}") from error
        except (RayActorError, ValueError) as error:
            raise RetryableError(f"{self._name} is not there: {type(error).__name__}") from error
        except RayError as error:
            raise RetryableError(f"{self._name}: {type(error).__name__}") from error
