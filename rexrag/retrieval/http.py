"""A search server with the /retrieve API, over HTTP. Every wait is bounded, and a failure is never a result.

POST /retrieve {"queries": [str], "topk": int, "return_scores": true}
  -> {"result": [[{"document": {"id", "contents"}, "score"} …]]}  or  {"result": [[{"id", "contents"} …]]}
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx

from rexrag.data.corpus import passage_of
from rexrag.data.rows import RowError, id_of, shown
from rexrag.errors import ConfigError, RetrieverError
from rexrag.retrieval.backoff import longest_search_s, pause_bound_s
from rexrag.types import Passage

_TOO_MANY_REQUESTS: Final = 429
_PROBE_QUERY: Final = "test"
_FILLER_SCORE: Final = -1e38
"""Servers over FAISS fill up a result with the last passage at the least float where `topk` exceeds the corpus."""


class _Retryable(Exception):
    """A failure that may pass: connection, time-out, 5xx, 429."""


class HttpRetriever:
    """Asks a server for passages, again with back-off where a failure may pass.

        retriever = HttpRetriever("http://127.0.0.1:8000", timeout_s=10, max_retries=5)
        retriever.check()
        passages = await retriever.search("currency of Gabon", top_k=3)
        await retriever.close()

    Requests go straight to the server: proxies of the environment are not used. One instance belongs to one
    event loop.
    """

    def __init__(self, url: str, *, timeout_s: float, max_retries: int) -> None:
        """Nothing is sent yet.

        Args:
            url: base of the server, or its /retrieve.
            timeout_s: bound of one attempt as a whole, seconds.
            max_retries: attempts after the first.

        Raises:
            ConfigError: no http or https URL.
        """
        self._url = _base_url(url)
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)
        self._jitter = random.Random()

    @property
    def max_wait_s(self) -> float:
        """Bound of a whole `search`, seconds: all attempts and all pauses between them."""
        return longest_search_s(timeout_s=self._timeout_s, max_retries=self._max_retries)

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The server's passages for a query, best first, at most `top_k`.

        Raises:
            RetrieverError: it refused the query, answered in another form, or failed at every attempt.
        """
        assert top_k >= 1, f"top_k must be at least 1, got {top_k}"
        for attempt in range(self._max_retries + 1):
            if attempt:
                await asyncio.sleep(self._jitter.uniform(0.0, pause_bound_s(attempt - 1)))
            try:
                return await self._attempt(query, top_k)
            except _Retryable as error:
                failure = str(error)
        raise RetrieverError(f"{self._url}/retrieve failed {self._max_retries + 1} times, at last with: {failure}")

    def check(self) -> None:
        """Make sure that a usable server is there, with one attempt; blocks, for use before anything runs.

        Servers without /health are asked a question instead.

        Raises:
            ConfigError: unreachable, unwell, or no server of this API.
        """
        try:
            # In a thread of its own, so that it can be called with or without a running event loop.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(asyncio.run, self._check()).result()
        except (TimeoutError, httpx.HTTPError, _Retryable, RetrieverError) as error:
            raise ConfigError(
                f"retriever.url = {self._url}: no usable search server there ({_described(error)}); "
                "start it, or correct the address"
            ) from error

    async def _check(self) -> None:
        async with (
            asyncio.timeout(self._timeout_s),
            httpx.AsyncClient(timeout=self._timeout_s, trust_env=False) as client,
        ):
            health = await client.get(f"{self._url}/health")
            if health.is_success:
                return
            if health.is_server_error:
                raise _Retryable(f"/health: {_status(health)}")
            _passages(await client.post(f"{self._url}/retrieve", json=_request(_PROBE_QUERY, 1)), top_k=1)

    async def close(self) -> None:
        await self._client.aclose()

    async def _attempt(self, query: str, top_k: int) -> tuple[Passage, ...]:
        try:
            # The client's own time-outs bound single reads; a server that trickles would evade them.
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(f"{self._url}/retrieve", json=_request(query, top_k))
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Retryable(f"no answer within {self._timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise _Retryable(_described(error)) from error
        except httpx.RequestError as error:
            raise RetrieverError(f"{self._url}/retrieve: {_described(error)}") from error
        return _passages(response, top_k=top_k)


def _request(query: str, top_k: int) -> dict[str, object]:
    # Half a surrogate pair cannot be sent.
    text = query.encode("utf-8", "replace").decode("utf-8")
    return {"queries": [text], "topk": top_k, "return_scores": True}


def _passages(response: httpx.Response, *, top_k: int) -> tuple[Passage, ...]:
    """The passages of an answer to one query.

    Raises:
        _Retryable: 5xx or 429.
        RetrieverError: another status, or another form than either of the two.
    """
    if response.is_server_error or response.status_code == _TOO_MANY_REQUESTS:
        raise _Retryable(_status(response))
    if response.status_code != httpx.codes.OK:
        raise RetrieverError(f"{response.url}: {_status(response)}")
    try:
        return _parse(response.json(), top_k=top_k)
    except (ValueError, RecursionError) as error:
        raise RetrieverError(f"{response.url}: malformed answer: {error}") from error


def _parse(body: object, *, top_k: int) -> tuple[Passage, ...]:
    result = body.get("result") if isinstance(body, dict) else None
    if not isinstance(result, list) or len(result) != 1 or not isinstance(result[0], list):
        raise RowError(f'expected {{"result": [[…]]}} with one list, got {shown(body)}')
    passages = [_passage(entry) for entry in result[0]]
    return tuple(p for p in passages if p.score is None or p.score > _FILLER_SCORE)[:top_k]


def _passage(entry: object) -> Passage:
    if not isinstance(entry, dict):
        raise RowError(f"expected an object for each passage, got {shown(entry)}")
    document: object = entry.get("document", entry)
    score = entry.get("score") if "document" in entry else None
    if not isinstance(document, Mapping):
        raise RowError(f'expected an object as "document", got {shown(document)}')
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score)):
        raise RowError(f'expected a number as "score", got {shown(score)}')
    passage = passage_of(document, identity=id_of(document) or "", score=None if score is None else float(score))
    # Servers in front of web search give no ids; what a passage says identifies it there.
    return passage if passage.id else _with_content_id(passage)


def _with_content_id(passage: Passage) -> Passage:
    digest = hashlib.sha256(f"{passage.title}\n{passage.text}".encode()).hexdigest()[:16]
    return Passage(id=digest, title=passage.title, text=passage.text, score=passage.score)


def _base_url(url: str) -> str:
    base = url.strip().rstrip("/").removesuffix("/retrieve").rstrip("/")
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"retriever.url = {url!r} is no URL ({error}); give one such as http://127.0.0.1:8000"
        ) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"retriever.url = {url!r} must be http://HOST:PORT or https://…")
    return base


def _status(response: httpx.Response) -> str:
    return f"status {response.status_code} ({response.text[:200].strip()})"


def _described(error: Exception) -> str:
    return str(error) or type(error).__name__
