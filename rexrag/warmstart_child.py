"""The supervised start in a process of its own: what it needs of memory is free again when the run begins."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rexrag.errors import RunFailure, UserError
from rexrag.warmstart import PromptSettings, WarmstartProgress, WarmstartResult, warm_start

END_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class WarmstartRequest:
    """Arguments of `warm_start`."""

    model: Path
    demonstrations: Path
    out: Path
    seed: int
    learning_rate: float
    batch_size: int
    epochs: int
    prompt: PromptSettings
    threads: int


def warm_start_in_child(request: WarmstartRequest, *, progress: Callable[[WarmstartProgress], None]) -> WarmstartResult:
    """`warm_start`, elsewhere. The child ends with this call, whatever ends it.

    Raises:
        UserError: as `warm_start`.
        RunFailure: the child died or broke.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(request, sender), name="warm start", daemon=True)
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


def _work(request: WarmstartRequest, sender: Connection) -> None:
    # A stop from the terminal reaches both processes: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = warm_start(
            request.model,
            demonstrations=request.demonstrations,
            out=request.out,
            seed=request.seed,
            learning_rate=request.learning_rate,
            batch_size=request.batch_size,
            epochs=request.epochs,
            prompt=request.prompt,
            threads=request.threads,
            progress=sender.send,
        )
    except UserError as error:
        sender.send(error)
    except Exception as error:  # noqa: BLE001  # fault boundary of the process: the parent raises it
        sender.send(RunFailure(f"the warm start broke: {error!r}"))
    else:
        sender.send(result)
