"""Stop strings over tokens: which sampled token completes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Decode: TypeAlias = Callable[[Sequence[int]], str]


class StopFinder:
    """Says whether the newest of some sampled tokens completes a stop string.

    Only a short tail is decoded, and only when the newest token's own text can end a stop: it has the stop's last
    character in it, or that character may be spread over tokens (not ASCII) or be eaten by decoding (white space).
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def completes(self, token_ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether the last of `token_ids` completes a stop; the ones before it are known not to."""
        text = self._text(token_ids[-1])
        candidates = [s for s in stop if s[-1] in text or not s[-1].isascii() or s[-1].isspace()]
        if not candidates:
            return False
        # A token has at least one byte of text, so this many tokens hold any stop that ends in the newest.
        window = max(len(s.encode()) for s in candidates)
        tail = self._decode(token_ids[-window:])
        return any(s in tail for s in candidates)

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id])
        return text
