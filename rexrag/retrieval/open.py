"""From settings, or from what a user typed, to a retriever."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rexrag.errors import ConfigError
from rexrag.retrieval.bm25 import BM25Index, BM25Retriever
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.manifest import read_manifest
from rexrag.retrieval.packages import require_faiss
from rexrag.retrieval.protocol import BatchIndex


def open_index(
    folder: Path, *, encoder: Path | None = None, device: Literal["cpu", "cuda"] = "cpu", num_threads: int | None = None
) -> BatchIndex[Any]:
    """The index in a folder, of the kind that its manifest names, for calls that block.

    Args:
        encoder: where the encoder of a dense index is now; None: where it was.
        device: of the encoder.
        num_threads: of each stage of a dense index; None leaves them as they are.

    Raises:
        RetrievalIndexError: no usable index there.
        ConfigError: a dense one, and FAISS is not installed.
        ModelError: its encoder is missing or cannot be loaded.
    """
    if read_manifest(folder).kind == "bm25":
        return BM25Index(folder)
    require_faiss()
    from rexrag.retrieval.dense import DenseIndex

    return DenseIndex(folder, encoder=encoder, device=device, num_threads=num_threads)


def open_retriever(
    kind: Literal["bm25", "http"], *, path: Path | None, url: str | None, timeout_s: float, max_retries: int
) -> BM25Retriever | HttpRetriever:
    """The retriever that `retriever.*` names; a server is not asked yet (`HttpRetriever.check`).

    Raises:
        ConfigError: the path or the URL that the kind needs is missing, or is no URL.
        RetrievalIndexError: no usable index at the path.
    """
    if kind == "bm25":
        if path is None:
            raise ConfigError('retriever.path is not set, but retriever.kind = "bm25" needs an index folder')
        return BM25Retriever(path)
    if url is None:
        raise ConfigError('retriever.url is not set, but retriever.kind = "http" needs the address of a server')
    return HttpRetriever(url, timeout_s=timeout_s, max_retries=max_retries)


def open_target(target: str, *, timeout_s: float, max_retries: int) -> BM25Retriever | HttpRetriever:
    """The retriever behind `--index DIR|URL`, known to be usable: a server has been asked.

    Raises:
        ConfigError: no usable server at the URL.
        RetrievalIndexError: no usable index at the path.
    """
    if not is_server(target):
        return BM25Retriever(Path(target))
    retriever = HttpRetriever(target, timeout_s=timeout_s, max_retries=max_retries)
    retriever.check()
    return retriever


def is_server(target: str) -> bool:
    """Whether `--index DIR|URL` names a server."""
    return target.lower().startswith(("http://", "https://"))
