"""Real HTTP servers on loopback that answer as a test tells them to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Request:
    """What a server was asked."""

    method: str
    path: str
    body: dict[str, object]
    stopped: threading.Event
    headers: Mapping[str, str]


@dataclass
class SearchServer:
    """A running server: its address, and all requests so far."""

    url: str
    requests: list[Request] = field(default_factory=list)


Answer = tuple[int, bytes] | tuple[int, bytes, Mapping[str, str]] | None
"""Status, body, maybe headers; None closes the connection without an answer."""


def passages(*ids: str) -> bytes:
    """An answer in the form with scores."""
    entries = [
        {"document": {"id": i, "contents": f'"T{i}"\ntext {i}'}, "score": 1.0 / (n + 1)} for n, i in enumerate(ids)
    ]
    return json.dumps({"result": [entries]}).encode()


class _Server(ThreadingHTTPServer):
    # A longer queue than the standard 5: clients that find it full wait for a second.
    request_queue_size = 64


@contextlib.contextmanager
def serve(answer: Callable[[Request], Answer]) -> Iterator[SearchServer]:
    """A server whose every answer comes from `answer`; `Request.stopped` is set when the server ends."""
    stopped = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve({})

        def do_POST(self) -> None:
            self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _serve(self, body: dict[str, object]) -> None:
            request = Request(
                method=self.command, path=self.path, body=body, stopped=stopped, headers=dict(self.headers)
            )
            server.requests.append(request)
            if (answered := answer(request)) is None:
                return
            with contextlib.suppress(ConnectionError):
                self.send_response(answered[0])
                for name, value in (answered[2] if len(answered) == 3 else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answered[1])))
                self.end_headers()
                self.wfile.write(answered[1])

        def log_message(self, format: str, *args: object) -> None:
            pass

    http_server = _Server(("127.0.0.1", 0), Handler)
    server = SearchServer(url=f"http://127.0.0.1:{http_server.server_address[1]}")
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        stopped.set()
        http_server.shutdown()
        thread.join()
        http_server.server_close()
