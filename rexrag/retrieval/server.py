"""A search service behind HTTP, with Search-R1's API: POST /retrieve, GET /health, GET /metrics.

Everything that a client can do wrong is a 4xx that says what; a server that cannot answer now says 429 or 503, with
the seconds after which to ask again; an answer that does not come in time is a 504.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rexrag.errors import ConfigError, Overloaded, RetrievalIndexError, SearchTimeoutError
from rexrag.retrieval.api import (
    RequestRefusedError,
    body_too_long,
    parse_request,
    render_result,
)
from rexrag.retrieval.limits import Limits
from rexrag.retrieval.protocol import BatchIndex
from rexrag.retrieval.server_metrics import ServerMetrics
from rexrag.retrieval.service import SearchService, ServiceSettings

LOG = logging.getLogger(__name__)

_JSON: Final = "application/json"
_WARM_UP: Final = "Which city is the capital of the country?"
_WARM_UP_QUERIES: Final = 64
_CLOSED_REQUEST: Final = 499
_BROKEN: Final = 500
_UNAVAILABLE: Final = 503
_IDLE_CONNECTION_S: Final = 60
_PENDING_CONNECTIONS: Final = 2048
_RENDERED_AT_ONCE: Final = 1000
"""Passages of an answer that are written in the event loop, a few milliseconds; of more others would wait."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server answers.

    Attributes:
        token: what clients must send as a bearer token; None: everybody may ask.
        deadline_s: bound of a request, from its head to its answer, seconds.
        max_waiting: most distinct queries that wait.
    """

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    deadline_s: float = 60.0
    max_waiting: int = 16_384


class SearchApp:
    """The three paths over an index; `app` is what an ASGI server runs."""

    def __init__(self, index: BatchIndex[Any], *, settings: ServerSettings) -> None:
        self._settings = settings
        waiting = max(settings.max_waiting, settings.limits.max_queries)
        self._service = SearchService(index, settings=ServiceSettings(max_waiting=waiting))
        self._metrics = ServerMetrics()
        self._metrics.watch(lambda: self._service.counters, num_passages=index.num_passages)
        self._state = "warming up"
        self.app = FastAPI(lifespan=self._lifespan, openapi_url=None)
        self.app.add_route("/retrieve", self._retrieve, methods=["POST"])
        self.app.add_route("/health", self._health, methods=["GET"])
        self.app.add_route("/metrics", self._tell_metrics, methods=["GET"])

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(self._warm_up())
        yield
        self._state = "ending"
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await self._service.close()

    async def _warm_up(self) -> None:
        """The first searches map files and start threads: nobody should wait for that."""
        try:
            await self._service.search(_WARM_UP, top_k=1)
            size = min(_WARM_UP_QUERIES, self._settings.max_waiting)
            await self._service.search_many([f"{_WARM_UP} {i}" for i in range(size)], top_k=1)
        except Exception as error:  # fault boundary: /health says so
            LOG.exception("the index does not answer")
            self._state = f"broken: {error}"
        else:
            self._state = "ok"

    async def _health(self, _request: Request) -> Response:
        body = {"status": self._state, "passages": self._service.num_passages}
        return _json_response(200 if self._state == "ok" else _UNAVAILABLE, body)

    async def _tell_metrics(self, request: Request) -> Response:
        try:
            self._check_token(request)
        except RequestRefusedError as refusal:
            return _refusal(refusal)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _retrieve(self, request: Request) -> Response:
        began = time.monotonic()
        response = await self._answer(request)
        self._metrics.answered(response.status_code, seconds=time.monotonic() - began)
        return response

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._search(request)
        except RequestRefusedError as refusal:
            return _refusal(refusal)
        except Overloaded as error:
            status = _UNAVAILABLE if self._state == "ending" else 429
            return _error(status, str(error), {"Retry-After": str(math.ceil(error.retry_after_s))})
        except (TimeoutError, SearchTimeoutError):
            return _error(504, f"no answer within {self._settings.deadline_s:g} s, the deadline of this server")
        except ClientDisconnect:
            return _error(_CLOSED_REQUEST, "the client went away")
        except RetrievalIndexError as error:
            LOG.error("%s", error)
            return _error(_BROKEN, str(error))
        except Exception as error:  # fault boundary: one batch is lost, the server goes on
            LOG.exception("a search failed")
            return _error(_BROKEN, f"the search failed: {type(error).__name__}: {error}")

    async def _search(self, request: Request) -> Response:
        began, deadline_s = time.monotonic(), self._settings.deadline_s
        self._check_token(request)
        _check_content(request.headers)
        async with asyncio.timeout(deadline_s):
            body = await self._body(request)
        asked = parse_request(body, self._settings.limits)
        top_k = min(asked.top_k, self._service.num_passages)
        left_s = max(0.0, deadline_s - (time.monotonic() - began))
        found = await self._service.search_many(asked.queries, top_k=top_k, timeout_s=left_s)
        render = partial(render_result, found, with_scores=asked.with_scores)
        is_long = sum(map(len, found)) > _RENDERED_AT_ONCE
        return Response(await asyncio.to_thread(render) if is_long else render(), media_type=_JSON)

    async def _body(self, request: Request) -> bytes:
        """The whole body, of which no more than the limit is ever held."""
        limits = self._settings.limits
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limits.max_body_bytes:
            raise body_too_long(limits)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise body_too_long(limits)
        return bytes(body)

    def _check_token(self, request: Request) -> None:
        if self._settings.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Of equal time whatever was given, so that nobody can feel their way to the token.
        is_equal = hmac.compare_digest(given.strip().encode(), self._settings.token.encode())
        if scheme.lower() != "bearer" or not is_equal:
            raise RequestRefusedError(401, "send the header Authorization: Bearer TOKEN with this server's token")


def make_server(index: BatchIndex[Any], *, settings: ServerSettings) -> uvicorn.Server:
    """A server that is still to be run; it closes the index when it ends."""
    config = uvicorn.Config(
        SearchApp(index, settings=settings).app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(settings.deadline_s),
        backlog=_PENDING_CONNECTIONS,
    )
    return uvicorn.Server(config)


def serve(index: BatchIndex[Any], *, settings: ServerSettings, listener: socket.socket) -> None:
    """Answer at a socket until SIGTERM or SIGINT; what was accepted by then is answered first."""
    server = make_server(index, settings=settings)
    with _ended_by_signals(server):
        server.run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, where nobody listens yet.

    Args:
        port: 0: any free one.

    Raises:
        ConfigError: no such address here, or one in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol named: of connections without one asyncio leaves small answers waiting for 40 ms.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened at ({reason}); name an address of this machine and a "
            "port that is free, or stop what uses it"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only processes of this machine can reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Signals end the server, those before it has begun too, and nothing else: uvicorn raises them once more."""

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_content(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if kind != _JSON and not kind.endswith("+json"):
        raise RequestRefusedError(415, f"Content-Type {kind!r}: send {_JSON}")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestRefusedError(415, f"Content-Encoding {encoding!r}: send the body as it is, uncompressed")


def _refusal(refusal: RequestRefusedError) -> Response:
    return _error(refusal.status, refusal.reason, {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None)


def _error(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json_response(status, {"detail": reason}, headers)


def _json_response(status: int, body: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status_code=status, media_type=_JSON, headers=headers)
