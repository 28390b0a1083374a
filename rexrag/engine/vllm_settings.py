"""Settings of the engine over vLLM, and what follows from them for a model: memory, shapes, limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rexrag.engine.settings import EngineSettings
from rexrag.engine.vllm_types import CoreSettings
from rexrag.errors import ModelError, first_line
from rexrag.model.loading import Device
from rexrag.processes import memory_bytes

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
        cache_bytes=_cache_bytes(config, settings, place),
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


def _cache_bytes(config: PreTrainedConfig, settings: EngineSettings, place: Place) -> int | None:
    """Of each process; None: all that the model leaves of a GPU, which vLLM finds out where nobody else is on it."""
    if settings.device == "cpu":
        one = _sequence_bytes(config, settings)
        most = min(one * settings.max_sequences, memory_bytes() // _CACHE_SHARE)
        return max(one, most) // place.tensor_parallel
    if place.gpu_share == 1.0:
        return None
    total = int(torch.cuda.get_device_properties(0).total_memory)
    return shared_gpu_cache_bytes(config, settings, memory=int(place.gpu_share * _GPU_MARGIN * total))


def shared_gpu_cache_bytes(config: PreTrainedConfig, settings: EngineSettings, *, memory: int) -> int:
    """What the model and its passes leave of an engine's part of a GPU.

    vLLM would measure it, and take what other processes allocate meanwhile for its own.

    Raises:
        ModelError: not even one sequence fits.
    """
    width = _value_bytes(settings)
    weights = width * sum(math.prod(shape) for shape in parameter_sizes(config).values())
    # A pass has some sixteen rows of the model's width for each token, and a request for scores float32 logits.
    passes = _PREFILL_TOKENS["cuda"] * (16 * width * int(config.hidden_size) + 4 * int(config.vocab_size))
    left = memory - weights - passes
    if left < _sequence_bytes(config, settings):
        raise ModelError(
            f"rollout.num_gpus: an actor's part of its GPU, {memory / 1e9:.1f} GB, has no room for the model "
            f"({weights / 1e9:.1f} GB), its passes ({passes / 1e9:.1f} GB) and one sequence; raise it"
        )
    return left


def _sequence_bytes(config: PreTrainedConfig, settings: EngineSettings) -> int:
    """Keys and values of a sequence at its longest."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_size(config)
    return int(values) * _value_bytes(settings) * (settings.max_length + 64)  # the last block is never full


def _value_bytes(settings: EngineSettings) -> int:
    return int(getattr(torch, settings.dtype).itemsize)


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error: vLLM's hold objects that cannot be pickled."""
    return f"{type(error).__name__}: {first_line(error)}"


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
