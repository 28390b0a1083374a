from __future__ import annotations

from rexrag.retrieval.answer_cache import AnswerCache
from rexrag.types import Passage


def passages(num_chars: int) -> tuple[Passage, ...]:
    return (Passage(id="p", title="", text="x" * num_chars),)


def test_texts_are_bounded_and_the_least_used_go_first() -> None:
    cache = AnswerCache[str](3 * (1000 + 512))
    for name in "abc":
        cache.put(name, passages(1000))
    assert cache.get("a") == passages(1000)
    cache.put("a", passages(5))
    assert cache.get("a") == passages(1000), "two that asked at once have the same answer"
    cache.put("d", passages(1000))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("e", passages(9000))
    assert [name for name in "abcde" if cache.get(name) is not None] == [], "it would push out all others, and itself"
    cache.put("f", passages(1000))
    assert cache.get("f") is not None
    cache.clear()
    assert cache.get("f") is None


def test_without_room_nothing_is_kept() -> None:
    cache = AnswerCache[str](0)
    cache.put("a", ())
    assert cache.get("a") is None
