"""Ports for servers that a test starts later, or twice."""

from __future__ import annotations

import os
import socket
from itertools import cycle
from typing import Final

# Below those that systems give out by themselves: nobody else takes one before it is listened at. Tests that run side
# by side have ranges of their own.
_FIRST: Final = 21_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS: Final = cycle(range(_FIRST, _FIRST + 1_000))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, others at each call."""
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found
