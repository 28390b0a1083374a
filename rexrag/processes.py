"""Processes that compute: their environment, and a child for one piece of work, whose memory is free again after it."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from rexrag.errors import RexragError, RunFailure, counted

END_TIMEOUT_S = 60.0

StateT = TypeVar("StateT")
StateT_co = TypeVar("StateT_co", covariant=True)
ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)


Resources: TypeAlias = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, and those that a cluster has made up."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a part computes with, torch threads and GPUs, and what Ray reserves for it besides GPUs."""

    threads: int
    gpus: float = 0.0
    cpus: float = 0.0
    resources: Resources = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """All that Ray reserves, by its names."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """Of an actor that has this share."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "resources": dict(self.resources),
            "runtime_env": {"env_vars": process_environment(self.threads)},
        }


def in_words(amounts: Resources) -> str:
    """Resources for a reader: 4 CPUs, 1 GPU, 1 rollout."""
    known = ("CPU", "GPU")
    words = [counted(amount, name) if name in known else f"{amount:g} {name}" for name, amount in amounts.items()]
    return ", ".join(words) or "nothing"


class Work(Protocol[StateT_co, ResultT_co]):
    """A function that reports its state while it works; it, states and result can be pickled."""

    def __call__(self, *, progress: Callable[[StateT_co], None]) -> ResultT_co: ...


def num_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: of the machine's those that its affinity and its container's quota leave."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that the control group allows, version 2 or 1; infinite without a bound."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    return math.inf


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or what its container's bound leaves of it."""
    bound = math.inf
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no bound
            bound = int((cgroup / name).read_text())
            break
    return int(min(bound, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def process_environment(num_threads: int) -> dict[str, str]:
    """Environment of a process that computes.

    Threads that wait give their core to the other processes. glibc keeps freed memory of up to 32 MB a piece
    in place of handing it back and fetching it again at each pass: an eighth of the learner's time. oneDNN and torch
    keep a compiled product for each size of a micro-batch that they met, 1,024 by default: gigabytes, for nothing.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "LRU_CACHE_CAPACITY": "64",
    }


def give_way() -> None:
    """Have this process's own threads give their core to others while they wait; before torch is imported.

    By themselves they turn round and round, and where others work a model takes ten times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_in_child(
    work: Work[StateT, ResultT], *, name: str, environment: Mapping[str, str], progress: Callable[[StateT], None]
) -> ResultT:
    """`work(progress=progress)`, elsewhere. The child ends with this call, whatever ends it.

    Args:
        name: what it is, for error messages.
        environment: variables that the child has beside, or in place of, this process's.

    Raises:
        RexragError: as `work`.
        RunFailure: the child died or broke.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, name, sender), name=name, daemon=True)
    with _environment(environment):
        child.start()
    sender.close()
    try:
        while True:
            kind, content = receiver.recv()
            if kind == "state":
                progress(content)
            elif kind == "error":
                raise content
            else:
                child.join(END_TIMEOUT_S)
                result: ResultT = content
                return result
    except EOFError:
        child.join(END_TIMEOUT_S)
        raise RunFailure(
            f"{name} died with exit code {child.exitcode} (-9: killed, mostly for memory); start again"
        ) from None
    finally:
        child.terminate()
        child.join(END_TIMEOUT_S)
        receiver.close()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A process that is spawned inside begins with the variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(work: Work[StateT, ResultT], name: str, sender: Connection) -> None:
    # A stop from the terminal reaches both processes: the parent decides. Its word ends the work as an exception
    # would, so that scratch files and processes of the work's own go with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        result = work(progress=lambda state: sender.send(("state", state)))
    except RexragError as error:
        sender.send(("error", error))
    except Exception as error:  # noqa: BLE001  # fault boundary of the process: the parent raises it
        sender.send(("error", RunFailure(f"{name} broke: {error!r}")))
    else:
        sender.send(("result", result))
