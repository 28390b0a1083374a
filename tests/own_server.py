"""The program's own search server, for tests: in a thread, or as the command line starts it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from rexrag.retrieval.protocol import BatchIndex
from rexrag.retrieval.server import ServerSettings, bind, make_server

START_S = 120.0


@contextlib.contextmanager
def serving(
    index: BatchIndex[Any], *, settings: ServerSettings | None = None, port: int = 0, warm: bool = True
) -> Iterator[str]:
    """The URL of a server over an index, in a thread of this process."""
    listener = bind("127.0.0.1", port)
    listener.listen(64)  # who asks before the server runs waits for it
    server = make_server(index, settings=settings or ServerSettings())
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        if warm:
            await_health(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive(), "the server does not end"


def await_health(url: str, *, timeout_s: float = START_S) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError(f"{url} is not healthy after {timeout_s:g} s")


@contextlib.contextmanager
def served(folder: Path, *words: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of `rexrag index serve`."""
    process = start_server(folder, "--port", str(port), *words)
    try:
        yield url_of(process), process
    finally:
        process.kill()
        process.communicate()


def start_server(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rexrag", "index", "serve", str(folder), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})


def url_of(process: subprocess.Popen[str]) -> str:
    """What a server says of itself, once it listens."""
    lines: queue.Queue[str] = queue.Queue()
    assert process.stderr is not None
    stderr = process.stderr

    def read() -> None:
        for line in stderr:
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    told = ""
    while " at http://" not in told:
        told = lines.get(timeout=START_S)
    url = told.split(" at ")[1].strip().removesuffix("/retrieve")
    await_health(url)
    return url
