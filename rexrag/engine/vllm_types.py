"""What passes between the engine over vLLM and its core: plain, so that only the core needs vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rexrag.engine.protocol import GenerateRequest


@dataclass(frozen=True, kw_only=True)
class CoreRequest:
    """A request as the core takes it.

    Attributes:
        key: names it; never used twice.
        salt: requests of one salt share their prefixes.
        scored: log-probs of the prompt's tokens are wanted.
        reads_cache: whether what is cached of the prompt may be used: cached tokens have no log-probs.
    """

    key: str
    request: GenerateRequest
    salt: str
    scored: bool
    reads_cache: bool


@dataclass(frozen=True, kw_only=True)
class CoreOutput:
    """What a pass gave for a request.

    Attributes:
        token_ids, logprobs: sampled in this pass.
        ended: the core has let go of the request.
        reused, prefilled: tokens of the prompt that were cached and computed; in the first output alone.
        scores: log-probs of the last tokens of the prompt, as many as were computed; in the first output alone.
    """

    key: str
    token_ids: list[int]
    logprobs: list[float]
    ended: bool
    reused: int
    prefilled: int
    scores: list[float]


@dataclass(frozen=True, kw_only=True)
class CorePass:
    """A pass, and the core's state after it; `cache_use` is a share, 0 to 1."""

    outputs: list[CoreOutput]
    num_running: int
    cache_use: float
    preemptions: int
    forward_s: float


@dataclass(frozen=True, kw_only=True)
class CoreSettings:
    """What the core is built from.

    Attributes:
        model: folder of config and safetensors.
        eos_ids: tokens after which the core ends a request.
        cache_bytes: of the key-value cache; None: what the model leaves of `gpu_share`.
        gpu_share: share of a GPU's memory that a process may use, 0 on CPUs.
        tensor_parallel: processes, and GPUs, that the model is spread over; with 1 it is in this process.
        prefill_tokens: most tokens of one pass.
        num_threads: of each process.
    """

    model: str
    eos_ids: frozenset[int]
    max_sequences: int
    max_length: int
    dtype: Literal["float32", "bfloat16"]
    cache_bytes: int | None
    gpu_share: float
    tensor_parallel: int
    prefill_tokens: int
    num_threads: int | None
