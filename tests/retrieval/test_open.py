"""`rexrag.retrieval.open`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from search_servers import passages, serve

from rexrag.errors import ConfigError, RetrievalIndexError, UserError
from rexrag.retrieval.bm25 import BM25Index, BM25Retriever, build_bm25
from rexrag.retrieval.folders import open_index
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.open import check_retriever, open_retriever, target_kind
from rexrag.retrieval.pool import PoolRetriever
from rexrag.retrieval.service import SearchService
from rexrag.retrieval.settings import RetrieverSettings

BM25 = RetrieverSettings(
    kind="bm25",
    path=None,
    encoder=None,
    url=None,
    token_file=None,
    timeout_s=20.0,
    max_retries=0,
    batch_size=4,
    num_actors=2,
)
HTTP = replace(BM25, kind="http", url="http://127.0.0.1:1")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "a", "text": "x"}) + "\n")
    build_bm25(tmp_path / "c.jsonl", tmp_path / "index")
    return tmp_path / "index"


def test_by_settings(index: Path) -> None:
    assert isinstance(open_retriever(replace(BM25, path=index)), BM25Retriever)
    assert isinstance(open_retriever(HTTP), HttpRetriever)
    assert isinstance(open_retriever(replace(BM25, kind="faiss", path=index)), SearchService)
    assert isinstance(open_retriever(replace(BM25, kind="ray")), PoolRetriever)
    assert isinstance(open_index(index), BM25Index)


def test_settings_that_lack_their_part() -> None:
    for settings in (BM25, replace(BM25, kind="faiss")):
        with pytest.raises(ConfigError, match=r"retriever\.path is not set"):
            open_retriever(settings)
    for settings in (BM25, replace(BM25, kind="ray")):
        with pytest.raises(ConfigError, match=r"retriever\.path is not set"):
            check_retriever(settings, top_k=1)
    with pytest.raises(ConfigError, match=r"retriever\.url is not set"):
        open_retriever(replace(HTTP, url=None))


def test_what_is_checked_before_a_run(index: Path, tmp_path: Path) -> None:
    check_retriever(replace(BM25, path=index), top_k=1)
    check_retriever(replace(BM25, kind="ray", path=index), top_k=1)
    with pytest.raises(ConfigError, match=r'kind = "faiss": .*index of kind bm25; set retriever.kind = "bm25"'):
        check_retriever(replace(BM25, kind="faiss", path=index), top_k=1)
    with pytest.raises(RetrievalIndexError, match="no index there"):
        check_retriever(replace(BM25, path=tmp_path / "none"), top_k=1)
    with serve(lambda _: (200, passages("a"))) as server:
        check_retriever(replace(HTTP, url=server.url), top_k=1)
    with pytest.raises(UserError, match="no usable search server"):
        check_retriever(replace(HTTP, url=server.url), top_k=1)


def test_a_token_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    seen: list[str | None] = []

    def answer(request: object) -> tuple[int, bytes]:
        seen.append(getattr(request, "headers", {}).get("Authorization"))
        return 200, passages("a")

    with serve(answer) as server:
        check_retriever(replace(HTTP, url=server.url, token_file=tmp_path / "token"), top_k=1)
    assert seen == ["Bearer s3cret"] * 2
    with pytest.raises(ConfigError, match=r"retriever\.token_file = .*none: cannot be read"):
        open_retriever(replace(HTTP, token_file=tmp_path / "none"))
    (tmp_path / "token").write_text("two words")
    with pytest.raises(ConfigError, match=r"retriever\.token_file = .*must hold one word"):
        open_retriever(replace(HTTP, token_file=tmp_path / "token"))


def test_by_what_was_typed(index: Path, tmp_path: Path) -> None:
    assert target_kind(str(index)) == "bm25"
    assert target_kind("http://127.0.0.1:8000") == target_kind("HTTPS://x") == "http"
    with pytest.raises(RetrievalIndexError, match="no index there"):
        target_kind(str(tmp_path / "none"))
