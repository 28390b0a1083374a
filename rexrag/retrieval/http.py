"""A search server with the /retrieve API, over HTTP. Every wait is bounded, and a failure is never a result.

POST /retrieve {"queries": [str …], "topk": int, "return_scores": true}
  -> {"result": [[{"document": {"id", "contents"}, "score"} …] …]}  or  {"result": [[{"id", "contents"} …] …]}
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import httpx

from rexrag.data.rows import encodable
from rexrag.errors import ConfigError, QueryRefusedError, RetrieverError, RetrieverSetupError, counted
from rexrag.retrieval.answers import Body, passages_of, read_bounded
from rexrag.retrieval.attempts import PROBE_QUERY, Attempts, RetryableError
from rexrag.retrieval.batching import Batcher
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import Passage

LOG = logging.getLogger(__name__)

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 3
_DELIMITERS: Final = ("content-length", "transfer-encoding")
_INLINE_BYTES: Final = 1 << 16
"""Answers up to this length are parsed where they arrive; longer ones would hold up the event loop."""


class HttpRetriever:
    """Asks a server for passages, again with back-off where a failure may pass.

        retriever = HttpRetriever("http://127.0.0.1:8000", timeout_s=10, max_retries=5, batch_size=64)
        retriever.check(top_k=3)
        passages = await retriever.search("currency of Gabon", top_k=3)
        await retriever.close()

    A server that fails some times in a row is left alone: searches wait, each up to `max_wait_s`, while one probe at a
    time asks whether it is back.

    Requests go straight to the server: proxies of the environment are not used. One instance belongs to one
    event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_retries: int,
        batch_size: int,
        token: str | None = None,
        is_patient: bool = True,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: base of the server, or its /retrieve.
            timeout_s: bound of one attempt as a whole, seconds.
            max_retries: attempts after the first.
            batch_size: most queries of one request.
            token: sent as a bearer token.
            is_patient: whether searches wait for a server that is down; else they have their attempts, and that is it.

        Raises:
            ConfigError: no http or https URL.
        """
        self._url = _base_url(url)
        self._endpoint = f"{self._url}/retrieve"
        self._has_told_empty = False
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._token = token
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            headers={"Accept-Encoding": "gzip"} | ({} if token is None else {"Authorization": f"Bearer {token}"}),
            trust_env=False,
        )
        self._attempts = Attempts(
            self._endpoint,
            attempt=lambda query, top_k: self._batcher.ask(query, top_k),
            timeout_s=timeout_s,
            max_retries=max_retries,
            is_patient=is_patient,
        )
        self._batcher = Batcher(self._endpoint, send=self._ask, max_batch=batch_size, timeout_s=timeout_s)

    @property
    def max_wait_s(self) -> float:
        """Bound of a whole `search`, seconds: all attempts and all pauses between them."""
        return self._attempts.max_wait_s

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The server's passages for a query, best first, at most `top_k`.

        Raises:
            QueryRefusedError: it does not take this query.
            RetrieverSetupError: it is no server of this API, or does not let us in: every query would fail.
            RetrieverError: it failed at every attempt, or was down for as long as a search may take.
        """
        assert top_k >= 1, f"top_k must be at least 1, got {top_k}"
        return await self._attempts.search(query, top_k)

    def state(self) -> RetrieverState:
        return self._attempts.state()

    def check(self, *, top_k: int) -> None:
        """Make sure that a usable server is there; blocks, for use before anything runs.

        Its /health must not fail where it has one, and it must answer a query for `top_k` passages.

        Raises:
            ConfigError: unreachable, unwell, or no server of this API.
        """
        try:
            # In a thread of its own, so that it can be called with or without a running event loop.
            with ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(asyncio.run, self._check(top_k)).result()
        except QueryRefusedError as error:
            raise ConfigError(
                f"retriever.url = {self._url}: refuses a query for {counted(top_k, 'passage')} (env.top_k): {error}; "
                "lower env.top_k, or raise what the server allows"
            ) from error
        except (RetryableError, RetrieverError, RetrieverSetupError) as error:
            raise ConfigError(
                f"retriever.url = {self._url}: no usable search server there ({error}); "
                "start it, or correct the address"
            ) from error

    async def _check(self, top_k: int) -> None:
        # Another instance, since a client belongs to one event loop.
        asked = HttpRetriever(
            self._url,
            timeout_s=self._timeout_s,
            max_retries=self._max_retries,
            batch_size=1,
            token=self._token,
            is_patient=False,
        )
        try:
            health = await asked._send("GET", f"{self._url}/health")
            if health.status >= 500:
                raise RetryableError(f"/health: {health.described}")
            await asked.search(PROBE_QUERY, top_k=top_k)
        finally:
            await asked.close()

    async def close(self) -> None:
        await self._attempts.close()
        await self._batcher.close()
        await self._client.aclose()

    async def _ask(self, queries: Sequence[str], top_k: int) -> list[tuple[Passage, ...]]:
        body = await self._send("POST", self._endpoint, json=_request(queries, top_k))
        read = partial(passages_of, body, top_k=top_k, num_queries=len(queries))
        passages, num_empty = read() if len(body.content) <= _INLINE_BYTES else await asyncio.to_thread(read)
        if num_empty and not self._has_told_empty:
            self._has_told_empty = True
            LOG.warning("%s: passages without text are left out, %d in this answer", self._endpoint, num_empty)
        return passages

    async def _send(self, method: str, url: str, *, json: object = None) -> Body:
        """One answer, redirects on the same server followed.

        Raises:
            RetryableError: none came, or none within `timeout_s`.
            RetrieverSetupError: a redirect that leads elsewhere, or an answer that is not HTTP as it was asked for.
        """
        try:
            # The client's own time-outs bound single reads; a server that trickles would evade them.
            async with asyncio.timeout(self._timeout_s):
                for _ in range(_MAX_REDIRECTS):
                    body, location = await self._exchange(method, url, json=json)
                    if location is None:
                        return body
                    url = self._redirected(url, location)
                raise RetrieverSetupError(f"{url}: more than {_MAX_REDIRECTS} redirects; correct retriever.url")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise RetryableError.late(self._timeout_s) from error
        except httpx.TransportError as error:
            raise RetryableError(_described(error)) from error
        except (httpx.RequestError, httpx.InvalidURL, ValueError) as error:
            raise RetrieverSetupError(f"{url}: {_described(error)}") from error

    async def _exchange(self, method: str, url: str, *, json: object) -> tuple[Body, str | None]:
        """One request and its answer; where it is redirected to."""
        async with self._client.stream(method, url, json=json) as response:
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            content, is_whole = await read_bounded(response.aiter_raw(), encoding=encoding)
        body = Body(
            url=url,
            status=response.status_code,
            content=content,
            is_whole=is_whole,
            is_delimited=not response.headers.keys().isdisjoint(_DELIMITERS),
            retry_after=response.headers.get("Retry-After", ""),
        )
        return body, response.headers.get("Location") if response.status_code in _REDIRECTS else None

    def _redirected(self, url: str, location: str) -> str:
        """Where a redirect leads; a later query goes there at once. Queries are not sent to other servers."""
        asked = httpx.URL(url)
        target = asked.join(location)
        # On its way a query, and the token with it, may get a cipher, but not lose it or change to another service.
        is_same = (target.scheme, target.host, target.port) == (asked.scheme, asked.host, asked.port)
        if not is_same and (target.host, target.scheme, asked.scheme) != (asked.host, "https", "http"):
            raise RetrieverSetupError(f"{url}: redirects to {target}, another server; set retriever.url if it is meant")
        if url == self._endpoint:
            self._endpoint = str(target)
        return str(target)


def _request(queries: Sequence[str], top_k: int) -> dict[str, object]:
    return {"queries": [encodable(query) for query in queries], "topk": top_k, "return_scores": True}


def _base_url(url: str) -> str:
    base = url.strip().rstrip("/").removesuffix("/retrieve").rstrip("/")
    try:
        parsed = httpx.URL(base)
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"retriever.url = {url!r} is no URL ({error}); give one such as http://127.0.0.1:8000"
        ) from error
    if parsed.userinfo:
        raise ConfigError(
            "retriever.url: has a user or password in it, which would stand in the run folder and in logs; take it "
            "out, and put a bearer token into a file (retriever.token_file)"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"retriever.url = {url!r} must be http://HOST:PORT or https://…")
    return base


def _described(error: Exception) -> str:
    return str(error) or type(error).__name__
