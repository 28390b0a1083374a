"""A dense index behind a service, a server, and the settings of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from dense_worlds import QUERIES
from own_server import serving
from test_open import BM25, HTTP
from tiny_encoders import make_encoder, passage_rows, write_rows

from rexrag.errors import ConfigError, ModelError, RetrievalIndexError, UserError
from rexrag.retrieval.dense import DenseIndex
from rexrag.retrieval.dense_build import DenseSettings, build_dense
from rexrag.retrieval.folders import open_index
from rexrag.retrieval.open import check_retriever, open_retriever, target_kind
from rexrag.retrieval.protocol import Retriever
from rexrag.retrieval.service import SearchService
from rexrag.types import Passage

FAISS = replace(BM25, kind="faiss")
ASKED = QUERIES[:130]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    corpus = write_rows(root / "corpus.jsonl", passage_rows(120))
    build_dense(
        corpus, root / "index", encoder=make_encoder(root / "encoder"), settings=DenseSettings(precision="fp32")
    )
    return root / "index"


def same(found: Sequence[Passage], wanted: Sequence[Passage]) -> bool:
    """Whether passages are equal; a text's vector differs in its last digits with those that it is encoded beside."""
    scores = [(one.score or 0.0, other.score or 0.0) for one, other in zip(found, wanted, strict=True)]
    return [p.id for p in found] == [p.id for p in wanted] and all(abs(a - b) < 1e-4 for a, b in scores)


async def ask_all(retriever: Retriever) -> list[Sequence[Passage]]:
    found = await asyncio.gather(*(retriever.search(query, top_k=3) for query in ASKED))
    await retriever.close()
    return found


def test_in_the_process_and_behind_a_server_each_caller_gets_what_the_index_finds(folder: Path) -> None:
    index = DenseIndex(folder, num_threads=1)
    wanted = [index.find(index.prepare([query]), top_k=3)[0] for query in ASKED]
    settings = replace(FAISS, path=folder)
    check_retriever(settings, top_k=1)
    retriever = open_retriever(settings)
    assert isinstance(retriever, SearchService)
    found = asyncio.run(ask_all(retriever))
    assert max(retriever.counters.batch_sizes) == 64, "batches were full"
    assert all(map(same, found, wanted))
    with serving(open_index(folder, num_threads=1)) as url:
        found = asyncio.run(ask_all(open_retriever(replace(HTTP, url=url, timeout_s=20.0))))
    assert all(map(same, found, wanted))


def test_the_kind_of_an_index_goes_by_its_manifest(folder: Path, tmp_path: Path) -> None:
    assert target_kind(str(folder)) == "faiss"
    check_retriever(replace(BM25, kind="ray", path=folder), top_k=1)
    with pytest.raises(ConfigError, match=r'kind = "bm25": .* is an index of kind flat; set retriever.kind = "faiss"'):
        check_retriever(replace(BM25, path=folder), top_k=1)
    with pytest.raises(UserError):
        check_retriever(replace(FAISS, path=folder, encoder=tmp_path / "none"), top_k=1)
    other = make_encoder(tmp_path / "other", seed=1)
    with pytest.raises((ModelError, RetrievalIndexError), match="is not the one of this index"):
        check_retriever(replace(FAISS, path=folder, encoder=other), top_k=1)
