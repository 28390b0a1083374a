"""The supervised start in a process of its own: what it needs of memory is free again when the run begins."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Protocol

from rexrag.errors import RunFailure, UserError
from rexrag.warmstart import WarmstartProgress, WarmstartResult

END_TIMEOUT_S = 60.0


class Start(Protocol):
    """`warm_start` but for its progress."""

    def __call__(self, *, progress: Callable[[WarmstartProgress], None]) -> WarmstartResult: ...


def warm_start_in_child(
    start: Start, *, environment: Mapping[str, str], progress: Callable[[WarmstartProgress], None]
) -> WarmstartResult:
    """`start(progress=...)`, elsewhere. The child ends with this call, whatever ends it.

    Args:
        start: `warm_start` with all its arguments but `progress` (`functools.partial`).
        environment: variables that the child has beside, or in place of, this process's.

    Raises:
        UserError: as `warm_start`.
        RunFailure: the child died or broke.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(start, sender), name="warm start", daemon=True)
    with _environment(environment):
        child.start()
    sender.close()
    try:
        while True:
            message = receiver.recv()
            if isinstance(message, WarmstartProgress):
                progress(message)
            elif isinstance(message, WarmstartResult):
                return message
            else:
                raise message
    except EOFError:
        child.join(END_TIMEOUT_S)
        raise RunFailure(
            f"the warm start died with exit code {child.exitcode} (-9: killed, mostly for memory); start again"
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


def _work(start: Start, sender: Connection) -> None:
    # A stop from the terminal reaches both processes: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = start(progress=sender.send)
    except UserError as error:
        sender.send(error)
    except Exception as error:  # noqa: BLE001  # fault boundary of the process: the parent raises it
        sender.send(RunFailure(f"the warm start broke: {error!r}"))
    else:
        sender.send(result)
