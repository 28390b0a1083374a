"""Packed passes are used only where they give what the model's own forward pass gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from learner_builders import small_model, tiny_model
from transformers import BloomConfig, Gemma2Config, GraniteConfig, LlamaConfig, MistralConfig, PretrainedConfig

from rexrag.errors import ModelError
from rexrag.model import comparison
from rexrag.model.comparison import prepare_model

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (Gemma2Config, {"final_logit_softcapping": 1.0}),
        (GraniteConfig, {"logits_scaling": 8.0}),
        (BloomConfig, {}),
    ],
)
def test_what_is_more_than_body_and_head_is_refused(
    architecture: type[PretrainedConfig], settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=r"packed rows.*take a dense Llama- or Qwen-like model"):
        prepare_model(small_model(architecture, **settings), length=32)


def test_frequencies_that_grow_with_the_row_are_refused_once_rows_get_there() -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    prepare_model(small_model(LlamaConfig, rope_parameters=rope, max_position_embeddings=16), length=16)
    with pytest.raises(ModelError, match=r"packed rows of up to 64 tokens differ from its own"):
        prepare_model(small_model(LlamaConfig, rope_parameters=rope, max_position_embeddings=16), length=64)


def test_beyond_the_compared_length_the_settings_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_MAX_TOKENS", 16)
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    with pytest.raises(ModelError, match=r"'dynamic' depends on the length .* at most 16"):
        prepare_model(small_model(LlamaConfig, rope_parameters=rope, max_position_embeddings=32), length=64)


@pytest.mark.parametrize("factor", [4, 4.0])
def test_fixed_frequencies_are_as_good_as_none(factor: float) -> None:
    rope = {**ROPE, "rope_type": "yarn", "factor": factor}
    prepare_model(small_model(LlamaConfig, rope_parameters=rope, max_position_embeddings=64), length=64)


def test_a_window_shorter_than_the_rows_is_refused_at_once() -> None:
    with pytest.raises(ModelError, match=r"a row has \d+ tokens, the model's sliding window is 10"):
        prepare_model(small_model(MistralConfig, sliding_window=10), length=32)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="its weights are damaged"):
        prepare_model(model, length=16)
