from __future__ import annotations

from rexrag.retrieval.answer_cache import AnswerCache
from rexrag.types import Passage


def passages(num_chars: int) -> tuple[Passage, ...]:
    return (Passage(id="p", title="", text="x" * num_chars),)


def test_texts_are_bounded_and_the_least_used_go_first() -> None:
    cache = AnswerCache(3 * (1000 + 512 + 1))
    for name in "abc":
        cache.put((name, 1), passages(1000))
    assert cache.get(("a", 1)) == passages(1000)
    cache.put(("a", 1), passages(5))
    assert cache.get(("a", 1)) == passages(1000), "two that asked at once have the same answer"
    cache.put(("d", 1), passages(1000))
    assert [name for name in "abcd" if cache.get((name, 1)) is not None] == ["a", "c", "d"]
    cache.put(("e", 1), passages(9000))
    assert [name for name in "abcde" if cache.get((name, 1)) is not None] == [], (
        "it would push out all others, and itself"
    )
    cache.put(("f", 1), passages(1000))
    assert cache.get(("f", 1)) is not None
    cache.clear()
    assert cache.get(("f", 1)) is None


def test_without_room_nothing_is_kept() -> None:
    cache = AnswerCache(0)
    cache.put(("a", 1), ())
    assert cache.get(("a", 1)) is None


def test_queries_weigh_too() -> None:
    cache = AnswerCache(10_000)
    for number in range(100):
        cache.put((f"{number} {'word ' * 800}", 3), ())
    assert sum(cache.get((f"{number} {'word ' * 800}", 3)) is not None for number in range(100)) == 2
