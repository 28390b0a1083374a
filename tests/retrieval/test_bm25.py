"""`rexrag.retrieval.bm25` over real tantivy indexes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.corpus import iter_corpus
from rexrag.errors import DataError, RetrievalIndexError
from rexrag.retrieval import bm25
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.manifest import read_manifest
from rexrag.types import Passage

_T = TypeVar("_T")
FACTS = ("currency", "capital", "language")


def write_corpus(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def country_rows(countries: int) -> list[dict[str, object]]:
    return [
        {"id": f"{fact}-{i}", "contents": f'"Land{i}"\nThe {fact} of Land{i} is the Coin{i}.'}
        for i in range(countries)
        for fact in FACTS
    ]


def now(search: Coroutine[None, None, _T]) -> _T:
    """The result of a search, in an event loop of its own."""
    return asyncio.run(search)


def ids(found: Sequence[Passage]) -> list[str]:
    return [passage.id for passage in found]


@pytest.fixture(scope="module")
def countries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BM25Retriever]:
    folder = tmp_path_factory.mktemp("countries")
    build_bm25(write_corpus(folder / "corpus.jsonl", country_rows(300)), folder / "index")
    retriever = BM25Retriever(folder / "index")
    yield retriever
    asyncio.run(retriever.close())


def test_the_passage_asked_for_comes_first(countries: BM25Retriever) -> None:
    found = now(countries.search("What is the currency of Land7?", top_k=3))
    assert found[0] == Passage(
        id="currency-7", title="Land7", text="The currency of Land7 is the Coin7.", score=found[0].score
    )
    scores = [p.score for p in found if p.score is not None]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_scores_are_those_of_bm25(tmp_path: Path) -> None:
    texts = ["red apple", "red red pear", "green grape and more"]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index")
    found = now(BM25Retriever(tmp_path / "index").search("red pear", top_k=3))
    lengths = [len(text.split()) for text in texts]
    mean = sum(lengths) / 3

    def weight(count: int, documents: int, length: int) -> float:
        inverse = math.log(1 + (3 - documents + 0.5) / (documents + 0.5))
        return inverse * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))

    expected = {"1": weight(2, 2, 3) + weight(1, 1, 3), "0": weight(1, 2, 2)}
    assert {p.id: p.score for p in found} == pytest.approx(expected, rel=1e-4)


def test_words_match_across_case_accents_and_forms(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "São Tomé has many islands"}, {"id": "b", "text": "a plain"}]
    build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    for query in ("SAO TOME", "são", "Island", "tomé's"):
        assert ids(now(retriever.search(query, top_k=1))) == ["a"]


def test_equal_scores_have_another_order_for_another_query(countries: BM25Retriever) -> None:
    queries = [f"currency unknownword{i}" for i in range(40)]
    firsts = [ids(now(countries.search(query, top_k=3))) for query in queries]
    assert all(name.startswith("currency-") for found in firsts for name in found)
    assert len({found[0] for found in firsts}) > 20
    shared = [[name for name in ("currency-1", "currency-2") if name in found] for found in firsts]
    assert sum(map(len, shared)) < 20, "no passage is preferred"


def test_two_equal_passages_swap_places(tmp_path: Path) -> None:
    rows = [{"id": name, "text": f"Beac is a coin of {name}"} for name in ("gabon", "chad")]
    build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    firsts = [ids(now(retriever.search(f"coin x{i}", top_k=2)))[0] for i in range(60)]
    assert 15 <= firsts.count("gabon") <= 45


def test_order_depends_on_query_and_ids_alone(countries: BM25Retriever, tmp_path: Path) -> None:
    build_bm25(write_corpus(tmp_path / "c.jsonl", country_rows(300)[::-1]), tmp_path / "index")
    reversed_corpus = BM25Retriever(tmp_path / "index")
    for query in ("currency of", "the coin", "capital x"):
        found = ids(now(countries.search(query, top_k=5)))
        assert ids(now(reversed_corpus.search(query, top_k=5))) == found
    # Written out, so that an order that depends on the process shows.
    assert ids(now(countries.search("currency of", top_k=3))) == ["currency-12", "currency-269", "currency-299"]
    assert ids(now(countries.search("currency of", top_k=3))) == ids(now(countries.search("currency of", top_k=5)))[:3]


@pytest.mark.parametrize("query", ["", "   ", "?!", "zzzz", "unknown words only qqqq"])
def test_no_known_term_finds_nothing(countries: BM25Retriever, query: str) -> None:
    assert now(countries.search(query, top_k=3)) == ()


@settings(deadline=None, max_examples=150)
@given(query=st.text(), top_k=st.integers(1, 8))
def test_any_query_is_answered(countries: BM25Retriever, query: str, top_k: int) -> None:
    found = now(countries.search(query, top_k=top_k))
    assert len(found) <= top_k
    assert len(set(ids(found))) == len(found)


@pytest.mark.parametrize(
    "query", ['currency: "Land7', "Land7 AND (", "contents:Land7^9", "+Land7 -currency", "\ud800 Land7"]
)
def test_query_syntax_and_broken_text_are_plain_words(countries: BM25Retriever, query: str) -> None:
    assert all(p.title == "Land7" for p in now(countries.search(query, top_k=1)))
    assert len(now(countries.search(query, top_k=1))) == 1


def test_more_passages_than_there_are_and_very_long_queries(tmp_path: Path) -> None:
    build_bm25(write_corpus(tmp_path / "c.jsonl", country_rows(2)), tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    assert len(now(retriever.search("the currency", top_k=100))) == 6
    long = "currency " * 5_000 + " ".join(f"w{i}" for i in range(5_000))
    assert now(retriever.search(long, top_k=1))[0].id.startswith("currency-")


def test_answers_take_about_a_millisecond(countries: BM25Retriever) -> None:
    async def run() -> list[float]:
        times = []
        for i in range(200):
            start = time.thread_time()
            await countries.search(f"what is the capital of Land{i} please", top_k=3)
            times.append(time.thread_time() - start)
        return times

    assert sorted(asyncio.run(run()))[20] < 2e-3


def test_parquet_is_searched_like_jsonl(countries: BM25Retriever, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(country_rows(300)), tmp_path / "c.parquet")
    manifest = build_bm25(tmp_path / "c.parquet", tmp_path / "index")
    (tmp_path / "c.parquet").unlink()
    retriever = BM25Retriever(tmp_path / "index")
    for query in ("currency of Land12", "coin"):
        assert now(retriever.search(query, top_k=3)) == now(countries.search(query, top_k=3))
    assert (manifest.corpus.stored, manifest.passages) == (True, 900)


def test_the_users_corpus_is_not_copied_nor_touched(tmp_path: Path) -> None:
    texts = [os.urandom(2_000).hex() for _ in range(20)]
    corpus = write_corpus(tmp_path / "c.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    before = (corpus.read_bytes(), corpus.stat().st_mtime_ns)
    build_bm25(corpus, tmp_path / "index")
    assert (corpus.read_bytes(), corpus.stat().st_mtime_ns) == before
    files = [path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()]
    assert not any(texts[0].encode() in content for content in files)


@pytest.mark.parametrize(("name", "told"), [("none.jsonl", "no such file"), (".", "is a folder")])
def test_a_corpus_that_is_not_there(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        build_bm25(tmp_path / name, tmp_path / "index")


def test_a_bad_corpus_leaves_nothing_behind_and_the_old_index_alone(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", country_rows(3))
    build_bm25(corpus, tmp_path / "index")
    bad = write_corpus(tmp_path / "bad.jsonl", [*country_rows(3), {"id": "currency-0", "text": "again"}])
    with pytest.raises(DataError, match="line 10: id 'currency-0' is also in line 1"):
        build_bm25(bad, tmp_path / "index")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "c.jsonl", "index"]
    assert len(now(BM25Retriever(tmp_path / "index").search("capital", top_k=9))) == 3


def test_every_passage_of_a_corpus_can_be_found(countries: BM25Retriever, tmp_path: Path) -> None:
    for passage in iter_corpus(write_corpus(tmp_path / "c.jsonl", country_rows(300))):
        assert now(countries.search(passage.text, top_k=1))[0].id == passage.id


def test_a_closed_index_lets_go_of_its_files(tmp_path: Path) -> None:
    build_bm25(write_corpus(tmp_path / "c.jsonl", country_rows(1)), tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    asyncio.run(retriever.close())
    with pytest.raises(ValueError, match="closed"):
        now(retriever.search("currency", top_k=1))


def test_a_search_does_not_hold_up_the_event_loop(countries: BM25Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "INLINE_PASSAGES", 0)
    in_search, go_on = threading.Event(), threading.Event()

    def slow(query: str, top_k: int) -> tuple[Passage, ...]:
        in_search.set()
        assert go_on.wait(10), "the loop has to run while a search does"
        return ()

    async def run() -> None:
        searching = asyncio.create_task(countries.search("currency of nowhere", top_k=1))
        while not in_search.is_set():
            await asyncio.sleep(0.001)
        go_on.set()
        assert await searching == ()

    monkeypatch.setattr(countries._index, "find_one", slow)
    asyncio.run(run())


SPACELESS = [
    ("加蓬的首都是哪里", "利伯维尔是加蓬共和国的首都和最大城市位于大西洋沿岸加蓬河口附近。", "布拉柴维尔是一条河。"),
    ("ガボンの首都", "リーブルヴィルはガボンの首都である。", "川が流れている。"),
    ("서울 인구", "서울은 한국의 수도이며 인구가 많다.", "강이 흐른다."),
]


@pytest.mark.parametrize(("query", "wanted", "other"), SPACELESS)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_scripts_without_spaces_are_searched(
    tmp_path: Path, query: str, wanted: str, other: str, ascii_only: bool
) -> None:
    rows = [{"id": "w", "text": wanted}, {"id": "o", "text": other}, {"id": "e", "text": "Islands of São Tomé"}]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    manifest = build_bm25(corpus, tmp_path / "index")
    assert read_manifest(tmp_path / "index").analyser == manifest.analyser == "cjk-english-1"
    retriever = BM25Retriever(tmp_path / "index")
    assert ids(now(retriever.search(query, top_k=1))) == ["w"]
    assert ids(now(retriever.search("SAO TOME island", top_k=1))) == ["e"]


def test_a_few_names_in_another_script_change_nothing(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [*country_rows(300), {"id": "c", "text": "Its name is 加蓬."}]
    assert build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index").analyser == "english-1"


def test_a_script_that_is_not_covered_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"id": "a", "text": "กรุงเทพมหานครเป็นเมืองหลวง"}, {"id": "b", "text": "Bangkok is the capital"}]
    build_bm25(write_corpus(tmp_path / "c.jsonl", rows), tmp_path / "index")
    assert "of its letters are Thai" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_counted_in_the_manifest(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [{"id": "e", "title": "Empty", "text": ""}, {"id": "a", "title": "", "text": "x y"}]
    corpus = tmp_path / f"c.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), corpus)
    elif suffix == "json":
        corpus.write_text(json.dumps(rows))
    else:
        write_corpus(corpus, rows)
    manifest = build_bm25(corpus, tmp_path / "index")
    assert (manifest.passages, manifest.empty_rows, manifest.corpus.stored) == (1, 1, suffix != "jsonl")
    assert ids(now(BM25Retriever(tmp_path / "index").search("x", top_k=3))) == ["a"]


def test_damaged_postings_are_an_error(tmp_path: Path) -> None:
    build_bm25(write_corpus(tmp_path / "c.jsonl", country_rows(1)), tmp_path / "index")
    meta = tmp_path / "index" / "tantivy" / "meta.json"
    meta.write_bytes(b"x" * meta.stat().st_size)
    with pytest.raises(RetrievalIndexError, match="cannot be opened"):
        BM25Retriever(tmp_path / "index")
