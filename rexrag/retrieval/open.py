"""From settings, or from what a user typed, to a retriever."""

from __future__ import annotations

from pathlib import Path

from rexrag.errors import ConfigError
from rexrag.retrieval.bearer import read_token
from rexrag.retrieval.bm25 import BM25Retriever
from rexrag.retrieval.folders import open_index
from rexrag.retrieval.http import HttpRetriever
from rexrag.retrieval.manifest import check_index, read_manifest
from rexrag.retrieval.pool import PoolRetriever
from rexrag.retrieval.protocol import Retriever
from rexrag.retrieval.service import SearchService
from rexrag.retrieval.settings import Kind, RetrieverSettings


def open_retriever(settings: RetrieverSettings) -> Retriever:
    """The retriever that `retriever.*` names; what answers from elsewhere is not asked yet.

    Raises:
        ConfigError: the path or the URL that the kind needs is missing, or is no URL.
        RetrievalIndexError: no usable index at the path.
    """
    if settings.kind == "http":
        return _open_http(settings)
    if settings.kind == "ray":
        from rexrag.retrieval.search_actor import RemoteMember

        members = [RemoteMember(number) for number in range(settings.num_actors)]
        return PoolRetriever(members, timeout_s=settings.timeout_s, max_retries=settings.max_retries)
    if settings.path is None:
        raise ConfigError(f'retriever.path is not set, but retriever.kind = "{settings.kind}" needs an index folder')
    if settings.kind == "bm25":
        return BM25Retriever(settings.path)
    return SearchService(open_index(settings.path, encoder=settings.encoder))


def check_retriever(settings: RetrieverSettings, *, top_k: int) -> None:
    """Make sure that searches can be made: a server is asked, an index is read and compared, and opened.

    Raises:
        ConfigError: no usable server, or an index of another kind than `retriever.kind`.
        RetrievalIndexError: the index or its corpus is not what was built.
        ModelError: its encoder is missing or cannot be loaded.
    """
    if settings.kind == "http":
        _open_http(settings).check(top_k=top_k)
        return
    if settings.path is None:
        raise ConfigError(f'retriever.path is not set, but retriever.kind = "{settings.kind}" needs an index folder')
    kind = check_index(settings.path).kind
    if settings.kind != "ray" and (settings.kind == "bm25") != (kind == "bm25"):
        fitting = "bm25" if kind == "bm25" else "faiss"
        raise ConfigError(
            f'retriever.kind = "{settings.kind}": {settings.path} is an index of kind {kind}; set retriever.kind = '
            f'"{fitting}", or "ray", which takes every kind'
        )
    if kind != "bm25":
        open_index(settings.path, encoder=settings.encoder).close()


def target_kind(target: str) -> Kind:
    """The kind of retriever that `--index DIR|URL` names.

    Raises:
        RetrievalIndexError: no index at the path.
    """
    if is_server(target):
        return "http"
    return "bm25" if read_manifest(Path(target)).kind == "bm25" else "faiss"


def _open_http(settings: RetrieverSettings) -> HttpRetriever:
    if settings.url is None:
        raise ConfigError('retriever.url is not set, but retriever.kind = "http" needs the address of a server')
    token = None if settings.token_file is None else read_token(settings.token_file, name="retriever.token_file")
    return HttpRetriever(
        settings.url,
        timeout_s=settings.timeout_s,
        max_retries=settings.max_retries,
        batch_size=settings.batch_size,
        token=token,
    )


def is_server(target: str) -> bool:
    """Whether `--index DIR|URL` names a server."""
    return target.lower().startswith(("http://", "https://"))
