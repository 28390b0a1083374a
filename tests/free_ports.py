"""Ports for servers that a test starts later, or twice."""

from __future__ import annotations

import os
import socket
from itertools import cycle, islice
from typing import Final

# Below those that systems give out by themselves, so that none of these takes one before it is listened at. Up to fifty
# workers of a call have ranges of their own; other calls begin elsewhere in them.
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 50
_FIRST: Final = 21_000 + 200 * _WORKER
_PORTS: Final = islice(cycle(range(_FIRST, _FIRST + 200)), os.getpid() % 200, None)


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
