"""How much memory an engine over vLLM plans with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from plain_settings import engine_settings
from transformers import Qwen2Config

from rexrag.engine import vllm_settings
from rexrag.engine.vllm_settings import Place, core_settings, parameter_sizes, shared_gpu_cache_bytes
from rexrag.errors import ModelError

CONFIG = Qwen2Config(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SEQUENCE = 2 * 2 * 2 * 16 * 2 * (128 + 64)
"""Keys and values of two layers, two heads of 16, in bfloat16."""


def test_on_a_shared_gpu_the_cache_is_what_model_and_passes_leave() -> None:
    settings = engine_settings(max_sequences=4, max_length=128, dtype="bfloat16")
    num_weights = sum(math.prod(shape) for shape in parameter_sizes(CONFIG).values())
    passes = 4096 * (16 * 2 * 64 + 4 * 1000)
    memory = 2 * num_weights + passes + 1_000_000
    assert shared_gpu_cache_bytes(CONFIG, settings, memory=memory) == 1_000_000
    with pytest.raises(ModelError, match=r"rollout\.num_gpus: an actor's part of its GPU, .* has no room"):
        shared_gpu_cache_bytes(CONFIG, settings, memory=memory - 1_000_000 + SEQUENCE - 1)


def test_on_cpus_it_stays_within_a_part_of_what_the_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = engine_settings(max_sequences=4, max_length=128, dtype="bfloat16", device="cpu")
    monkeypatch.setattr(vllm_settings, "memory_bytes", lambda: 12 * SEQUENCE)

    def planned(**place: int) -> int | None:
        core = core_settings(Path("model"), config=CONFIG, settings=settings, place=Place(**place), eos_ids=frozenset())
        return core.cache_bytes

    assert planned() == 3 * SEQUENCE
    assert planned(tensor_parallel=2) == 3 * SEQUENCE // 2
    monkeypatch.setattr(vllm_settings, "memory_bytes", lambda: 1 << 40)
    assert planned() == 4 * SEQUENCE
