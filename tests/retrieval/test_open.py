"""`rexrag.retrieval.open`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_servers import passages, serve

from rexrag.errors import ConfigError, RetrievalIndexError, UserError
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.open import open_retriever, open_target
from rexrag.retrieval.protocol import Retriever


@pytest.fixture
def index(tmp_path: Path) -> Path:
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "a", "text": "x"}) + "\n")
    build_bm25(tmp_path / "c.jsonl", tmp_path / "index")
    return tmp_path / "index"


def test_by_settings(index: Path) -> None:
    retriever: Retriever = open_retriever("bm25", path=index, url=None, timeout_s=1, max_retries=0)
    assert isinstance(retriever, BM25Retriever)
    assert isinstance(open_retriever("http", path=None, url="http://x", timeout_s=1, max_retries=0), HttpRetriever)


def test_settings_that_lack_their_part() -> None:
    with pytest.raises(ConfigError, match=r"retriever\.path is not set"):
        open_retriever("bm25", path=None, url="http://x", timeout_s=1, max_retries=0)
    with pytest.raises(ConfigError, match=r"retriever\.url is not set"):
        open_retriever("http", path=Path("x"), url=None, timeout_s=1, max_retries=0)


def test_by_what_was_typed(index: Path, tmp_path: Path) -> None:
    assert isinstance(open_target(str(index), timeout_s=5, max_retries=0), BM25Retriever)
    with serve(lambda _: (200, passages("a"))) as server:
        assert isinstance(open_target(server.url, timeout_s=5, max_retries=0), HttpRetriever)
    with pytest.raises(UserError, match="no usable search server"):
        open_target(server.url, timeout_s=5, max_retries=0)
    with pytest.raises(RetrievalIndexError, match="no index there"):
        open_target(str(tmp_path / "none"), timeout_s=5, max_retries=0)
