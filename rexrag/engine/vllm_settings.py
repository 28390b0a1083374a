"""Settings of the engine over vLLM, and what follows from them for a model: memory, shapes, limits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rexrag.engine.settings import EngineSettings
from rexrag.engine.vllm_types import CoreSettings
from rexrag.errors import ModelError, first_line
from rexrag.model.loading import Device

CPU_HEAD_SIZES: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes for which vLLM has an attention on CPUs; it says so only at the first pass."""

_PREFILL_TOKENS: Final = {"cpu": 512, "cuda": 4096}
"""Most tokens of one pass: large enough for full speed, small enough that decoding goes on, and the bound of the rows
of log-probs over the vocabulary that a request for scores makes."""

_CACHE_SHARE: Final = 4
"""On CPUs the key-value cache is at most this part of the machine's memory."""

_GPU_MARGIN: Final = 0.9
"""Part of its share of a GPU that vLLM may plan with: the CUDA context and fragments come on top."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What an engine computes on.

    Attributes:
        gpu_share: share of each GPU's memory that is this engine's, as Ray reserved it; 0 on CPUs.
        tensor_parallel: GPUs that the model is spread over; on CPUs processes.
    """

    gpu_share: float = 0.0
    tensor_parallel: int = 1


def core_settings(
    folder: Path, *, config: PreTrainedConfig, settings: EngineSettings, place: Place, eos_ids: frozenset[int]
) -> CoreSettings:
    """The core's part of the settings, with memory, threads and the tokens of a pass worked out for each process."""
    threads = settings.num_threads
    return CoreSettings(
        model=str(folder),
        eos_ids=eos_ids,
        max_sequences=settings.max_sequences,
        max_length=settings.max_length,
        dtype=settings.dtype,
        cache_bytes=_cache_bytes(config, settings) // place.tensor_parallel if settings.device == "cpu" else None,
        gpu_share=place.gpu_share * _GPU_MARGIN,
        tensor_parallel=place.tensor_parallel,
        prefill_tokens=_PREFILL_TOKENS[settings.device],
        num_threads=None if threads is None else max(1, threads // place.tensor_parallel),
    )


def check_heads(config: PreTrainedConfig, *, device: Device, tensor_parallel: int) -> None:
    """Refuse a model that vLLM cannot run.

    Raises:
        ModelError: on CPUs it has no attention for heads of this size; or they cannot be dealt to the devices.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        num = int(getattr(config, name))
        if num % tensor_parallel and (name == "num_attention_heads" or tensor_parallel % num):
            raise ModelError(
                f"rollout.tensor_parallel = {tensor_parallel}: the model's {num} {name} cannot be dealt evenly to so "
                "many GPUs; take a divisor"
            )
    size = _head_size(config)
    if device == "cpu" and size not in CPU_HEAD_SIZES:
        raise ModelError(
            f"the model's attention heads have {size} dimensions, and vLLM on CPUs has only "
            f'{", ".join(map(str, CPU_HEAD_SIZES))}; set rollout.engine = "torch", or take another model'
        )


def parameter_sizes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by the names under which the learner exports weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _cache_bytes(config: PreTrainedConfig, settings: EngineSettings) -> int:
    """Memory in which all sequences fit at their longest, within a part of the machine's; never less than one."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_size(config)
    per_token = values * torch.empty(0, dtype=getattr(torch, settings.dtype)).element_size()
    one = per_token * (settings.max_length + 64)  # the last block is never full
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(max(one, min(one * settings.max_sequences, memory // _CACHE_SHARE)))


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error: vLLM's hold objects that cannot be pickled."""
    return f"{type(error).__name__}: {first_line(error)}"


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
