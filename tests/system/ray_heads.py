"""Heads of Ray clusters that a test starts by itself, and ends with all that they have started."""

from __future__ import annotations

import contextlib
import socket
import subprocess

import psutil


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held at once, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a head and all that it started, and nothing else."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=15)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=10)
    process.wait(timeout=10)
