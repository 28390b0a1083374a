"""Where a figure was measured: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
import transformers

INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Those that decide how fast float32 and bfloat16 are."""


def machine() -> dict[str, object]:
    """Processor, GPU, cores, load and versions."""
    flags = _cpuinfo("flags").split()
    return {
        "cpu": _cpuinfo("model name") or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def origin() -> dict[str, object]:
    """What a file of figures begins with: commit, time and machine."""
    return {"commit": commit(), "time": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}


def commit() -> str:
    """Commit of the checkout, with a mark where tracked files differ from it."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    tracked = ["git", "status", "--porcelain", "--untracked-files=no"]
    changed = subprocess.run(tracked, cwd=folder, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
