"""Tiny models of each architecture, an engine over them, and the transformers forward pass to compare with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from plain_settings import engine_settings
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from rexrag.engine.protocol import GenerateRequest, Generation, TokenText
from rexrag.engine.torch_engine import TorchEngine
from rexrag.engine.vllm_engine import VllmEngine
from rexrag.engine.vllm_environment import installed_for
from rexrag.engine.vllm_settings import Place
from rexrag.model.loading import Device
from rexrag.types import WeightVersion

needs_vllm = pytest.mark.skipif(
    installed_for() != "cpu", reason="needs vLLM for CPUs: `make test-vllm` runs it in .venv-vllm"
)

VOCAB_SIZE = 101
EOS_ID = 100
V0 = WeightVersion(incarnation="a", step=0)
V1 = WeightVersion(incarnation="a", step=1)

_NUM_HEADS = 6
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def make_model(name: str, *, seed: int = 0, head_dim: int = 8) -> PreTrainedModel:
    """`head_dim`: vLLM's attention on CPUs has none below 32."""
    # Wider models would have larger logits, and those a coarser float32.
    sizes: dict[str, Any] = {
        **_SIZES, "hidden_size": _NUM_HEADS * head_dim, "initializer_range": 0.3 * (8 / head_dim)
    }  # fmt: skip
    if name == "llama":
        config: PreTrainedConfig = LlamaConfig(**sizes, tie_word_embeddings=True)
    elif name == "llama-untied-biased-llama3rope":
        config = LlamaConfig(
            **sizes, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3_ROPE
        )
    elif name == "qwen2":
        config = Qwen2Config(**sizes, tie_word_embeddings=True)
    else:
        assert name == "qwen3"
        config = Qwen3Config(**sizes, head_dim=2 * head_dim, tie_word_embeddings=False)
    model = build(config, seed=seed)
    with torch.no_grad():  # biases and norms start at constants, which would hide that they are not used
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def build(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.train(False)
    return model


class Letters:
    """Token i is the i-th printable character; the last token ends the text."""

    def __init__(self, eos_ids: frozenset[int] = frozenset({EOS_ID})) -> None:
        self.eos_ids = eos_ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(33 + i) for i in ids)


def make_engine(
    model: PreTrainedModel,
    *,
    max_sequences: int = 8,
    max_length: int = 128,
    inflight: Literal["keep", "recompute"] = "keep",
    dtype: Literal["float32", "bfloat16"] = "float32",
    endless: bool = False,
    device: Device = "cpu",
) -> TorchEngine:
    settings = engine_settings(
        max_sequences=max_sequences,
        max_length=max_length,
        inflight=inflight,
        dtype=dtype,
        num_threads=1,
        device=device,
    )
    return TorchEngine(model, settings=settings, codec=Letters(frozenset()) if endless else Letters(), version=V0)


def make_vllm_engine(
    model: PreTrainedModel,
    *,
    folder: Path,
    codec: TokenText,
    max_sequences: int = 8,
    max_length: int = 128,
    inflight: Literal["keep", "recompute"] = "keep",
    dtype: Literal["float32", "bfloat16"] = "float32",
    tensor_parallel: int = 1,
) -> VllmEngine:
    model.save_pretrained(folder)
    settings = engine_settings(
        max_sequences=max_sequences, max_length=max_length, inflight=inflight, dtype=dtype, num_threads=1
    )
    place = Place(tensor_parallel=tensor_parallel)
    return VllmEngine(folder, settings=settings, place=place, codec=codec, version=V0)


async def generate_all(engine: TorchEngine, *requests: GenerateRequest) -> list[Generation]:
    try:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests)))
    finally:
        await engine.close()


def prompt(length: int, *, seed: int = 0) -> list[int]:
    return list(np.random.default_rng(seed).integers(0, EOS_ID, length).tolist())


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """[len(ids), V] log-probs of the token after each position, from one full forward pass of transformers."""
    logits = model(torch.tensor([list(ids)])).logits[0]
    return np.asarray(logits.float().log_softmax(-1))


def reference_of(model: PreTrainedModel, prompt_ids: Sequence[int], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """[len(tokens)] log-prob of each token after the prompt and the tokens before it."""
    logprobs = reference_logprobs(model, [*prompt_ids, *tokens])
    positions = np.arange(len(prompt_ids) - 1, len(prompt_ids) + len(tokens) - 1)
    return logprobs[positions, list(tokens)]


def weights_of(model: PreTrainedModel) -> dict[str, npt.NDArray[np.generic]]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
