"""What an episode needs of a retriever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rexrag.types import Passage


class Retriever(Protocol):
    """A search back end. In-process ones answer without suspending; remote ones bound every wait."""

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The best passages for a query, best first, at most `top_k`.

        Raises:
            RetrieverError: no result could be had in the end. Never an empty result in place of a failure.
        """

    async def close(self) -> None: ...
