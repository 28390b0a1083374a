"""Ray shell of a run's control: what is wanted of it from outside, and what it last said of itself.

    rexrag scale, stop ──▶ RunControl ◀──status, wanted──▶ the run's own process, about once a second
    rexrag status ◀────────────┘

The actor is named, in a namespace that follows from the run folder, so any process of the cluster finds it. It is not
detached: it ends with the run.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rexrag.errors import RunFailure
from rexrag.run.status import RunStatus

CONTROL_NAME: Final = "rexrag-control"
_HASH_LENGTH: Final = 6
_TAKEN_FOR_S: Final = 30.0
"""The control of a run that was killed lives on until Ray has noticed."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked for from outside, counted by `revision`.

    Attributes:
        num_actors: rollout actors; None: as the run decides.
        now: those that go give back what they have begun.
        stop: save a checkpoint and end.
    """

    revision: int = 0
    num_actors: int | None = None
    now: bool = False
    stop: bool = False


class RunControl:
    """Keeps the last status and what is wanted; each method is one step, none waits."""

    def __init__(self) -> None:
        # One that Ray has started anew counts from above where the one before it was: no wish is taken for an old one.
        self._wanted = Wanted(revision=time.time_ns())
        self._status: RunStatus | None = None

    async def exchange(self, status: RunStatus) -> Wanted:
        """The run tells how it is, and hears what is wanted."""
        self._status = status
        return self._wanted

    async def status(self) -> RunStatus | None:
        """What the run said last; None: nothing yet."""
        return self._status

    async def scale(self, num_actors: int, *, now: bool) -> None:
        self._change(num_actors=num_actors, now=now)

    async def stop(self) -> None:
        self._change(stop=True)

    def _change(self, **changes: object) -> None:
        self._wanted = replace(self._wanted, revision=self._wanted.revision + 1, **changes)  # type: ignore[arg-type]


def run_name(run_folder: Path) -> str:
    """The name of a run on its cluster, which follows from its folder: job id and namespace.

    Where another folder would have the same words a hash follows.

    >>> run_name(Path("/shared/runs/first"))
    'rexrag-shared-runs-first'
    >>> run_name(Path("/shared/runs/first-1"))
    'rexrag-shared-runs-first-1-e86ea0'
    """
    path = str(run_folder)
    words = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "-" for char in path)
    name = f"rexrag{words}" if words.startswith("-") else f"rexrag-{words}"
    if words == path.replace("/", "-") and "-" not in path:
        return name
    return f"{name}-{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:_HASH_LENGTH]}"


def is_short_for(words: str, name: str) -> bool:
    """Whether a run's name ends with these words of its folder."""
    end = f"-{words.strip('/').replace('/', '-')}"
    return name.endswith(end) or re.sub(rf"-[0-9a-f]{{{_HASH_LENGTH}}}$", "", name).endswith(end)


def start_control(run_folder: Path) -> ActorHandle[RunControl]:
    """The control of a run.

    Raises:
        RunFailure: another run of this folder goes on in the cluster.
    """
    namespace = run_name(run_folder)
    # Beside the run's own process, so that no other node's loss takes it away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "name": CONTROL_NAME,
        "namespace": namespace,
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": here,
    }
    deadline = time.monotonic() + _TAKEN_FOR_S
    while True:
        try:
            handle = ray.remote(RunControl).options(**options).remote()
        except ValueError as error:
            if time.monotonic() > deadline:
                raise RunFailure(f"a run of {run_folder} goes on in this cluster: stop it first ({error})") from error
            time.sleep(1.0)
        else:
            return cast("ActorHandle[RunControl]", handle)
