"""The processes that hold the learner's model together (`learner.num_ranks`), and what they tell one another.

All ranks run the same calls in the same order, on the same groups: each prepares the whole step, trains on its part of
the rows, and knows what all have come to. So they take the same decisions, and any of them could say what the others
say.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from rexrag.model.loading import Device

T = TypeVar("T")

LOOPBACK: Final = "127.0.0.1"
_ADDRESS_OF_INTERFACE: Final = 0x8915
"""SIOCGIFADDR of Linux."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where ranks meet: `host` is the first one's, `port` that of the store that it opened."""

    host: str
    port: int
    num_ranks: int
    timeout_s: float


class Ranks:
    """This process's place among them. The default is a learner that is one process alone.

    What is said to be of all ranks is a collective, and the same on each of them.
    """

    def __init__(self, *, rank: int = 0, num: int = 1, group: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            group: in which CPU tensors and objects travel; None where the process is alone.
        """
        if (num > 1) != (group is not None):
            raise ValueError(f"{num} ranks need a process group where they are several, and none for one")
        self.rank = rank
        self.num = num
        self._group = group

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and answers."""
        return self.rank == 0

    def part(self, costs: Sequence[int]) -> slice:
        """Which of the things with these costs are this rank's: stretches in order, of much the same cost."""
        ends = np.cumsum(costs)
        if not len(ends):
            return slice(0, 0)
        # A thing belongs where its middle is.
        owner = ((ends - np.asarray(costs) / 2) * self.num / ends[-1]).astype(np.int64)
        start, end = np.searchsorted(owner, (self.rank, self.rank + 1))
        return slice(int(start), int(end))

    def sum(self, value: float) -> float:
        """Sum of all ranks' values, in float64 and in their order."""
        return sum(self.gather(value))

    def norm(self, value: float) -> float:
        """Euclidean norm of what the ranks hold parts of, from that of each part."""
        return math.sqrt(self.sum(value * value)) if self.num > 1 else value

    def gather(self, value: T) -> list[T]:
        """All ranks' values, by rank."""
        if self.num == 1:
            return [value]
        values: list[T | None] = [None] * self.num
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]


def open_meeting(*, num_ranks: int, host: str, timeout_s: float) -> tuple[Meeting, TCPStore]:
    """Where the ranks of a learner can meet, on an address of this machine; the store must outlive them.

    It listens on that address alone.
    """
    with socket.create_server((host, 0)) as listener:
        port = int(listener.getsockname()[1])
        store = TCPStore(
            host,
            port,
            world_size=num_ranks,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    return Meeting(host=host, port=port, num_ranks=num_ranks, timeout_s=timeout_s), store


def join(meeting: Meeting, *, rank: int, device: Device, host: str = LOOPBACK, store: TCPStore | None = None) -> Ranks:
    """Become one of the ranks; returns when all have.

    Args:
        host: the address of this machine at which the others reach it.
        store: the first rank's own, from `open_meeting`.

    Raises:
        RuntimeError: the others did not come in time.
    """
    timeout = timedelta(seconds=meeting.timeout_s)
    if (interface := _interface_of(host)) is not None:  # by itself gloo takes that of the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if store is None:
        store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=meeting.num_ranks,
        timeout=timeout,
        device_id=torch.device(device, torch.cuda.current_device()) if device == "cuda" else None,
    )
    group = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(rank=rank, num=meeting.num_ranks, group=group)


def _interface_of(host: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None: it cannot be told."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return None
