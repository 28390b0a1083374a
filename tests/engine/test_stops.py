from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.engine.stops import StopFinder


class Pieces:
    """A byte-level tokenizer of a few pieces, counting what it decodes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.decoded = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def first_stop(pieces: Pieces, ids: Sequence[int], stop: tuple[str, ...]) -> int | None:
    finder = StopFinder(pieces)
    return next((n for n in range(1, len(ids) + 1) if finder.completes(ids[:n], stop)), None)


BPE = ["</", "sea", "rch", ">", ">\n", "search", "<", "/", "a", " "]
BYTES = [*(piece.encode() for piece in BPE), b"\xc3", b"\xa9"]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["</", "search", ">", "a"], 3),
        (["a", "<", "/", "sea", "rch", ">\n", "a"], 6),
        (["</", "search", "a", ">"], None),
        (["search", ">", "</", "search"], None),
    ],
)
def test_tags_over_several_tokens(tokens: list[str], expected: int | None) -> None:
    ids = [BPE.index(token) for token in tokens]
    assert first_stop(Pieces(BYTES), ids, ("</answer>", "</search>")) == expected


def test_a_stop_whose_last_character_is_spread_over_tokens() -> None:
    assert first_stop(Pieces(BYTES), [8, 10, 11], ("é",)) == 3


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=30), st.sampled_from(["</search>", ">", "aa", "é", "a "]))
@settings(deadline=None)
def test_the_first_token_that_completes_the_stop_is_found(ids: list[int], stop: str) -> None:
    expected = next((n for n in range(1, len(ids) + 1) if stop in Pieces(BYTES)(ids[:n])), None)
    assert first_stop(Pieces(BYTES), ids, (stop,)) == expected


def test_only_a_short_tail_is_decoded_and_only_where_a_stop_can_end() -> None:
    pieces = Pieces(BYTES)
    finder = StopFinder(pieces)
    ids = [8] * 2000
    for n in range(1, 2001):
        assert not finder.completes(ids[:n], ("</search>",))
    assert pieces.decoded == 1
    finder.completes([*ids, 3], ("</search>",))
    assert pieces.decoded == 1 + 1 + len("</search>")
