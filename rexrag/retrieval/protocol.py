"""What an episode needs of a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rexrag.types import Passage


class Retriever(Protocol):
    """A search back end. No search holds up the event loop, and every wait for another process has a bound."""

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Raises:
            QueryRefusedError: it does not take this query; another one may do.
            RetrieverSetupError: no query can be answered: the settings name something else than a retriever.
            RetrieverError: no result could be had in the end. Never an empty result in place of a failure.
        """

    async def close(self) -> None: ...
