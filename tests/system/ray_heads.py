"""Heads of Ray clusters that a test starts by itself, and ends with all that they have started."""

from __future__ import annotations

import contextlib
import subprocess

import psutil


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
