"""A model is switched to packed passes once these give the log-probs that its own forward pass gives.

Compared are a row as long as the run's and a short one beside it: whatever depends on the length of a sequence, or on
its neighbours (rotary frequencies that grow with it, windows, chunks), shows in one of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rexrag.errors import ModelError, counted
from rexrag.model.attention import use_packed_attention
from rexrag.model.logprobs import token_logprobs
from rexrag.model.packing import PackRow, pack

_SHORT_ROW: Final = 8
_NUM_COMPARED: Final = 64
"""Tokens at the end of the long row; the first ones of it are compared, too."""
_MAX_SCORES: Final = 1 << 28
"""Attention scores of a layer that exist at once (a gigabyte of them): with many heads the long row is cut there."""
_MAX_TOKENS: Final = 4096
_TOLERANCE: Final = 0.01
_GROWING_ROPE: Final = ("dynamic", "longrope")


def prepare_model(model: PreTrainedModel, *, length: int) -> None:
    """Switch `model` to packed passes, after a comparison with its own forward pass.

    Args:
        length: of the longest row to come.

    Raises:
        ModelError: the model does more than body and output head (soft-capped or scaled logits, sinks, ...), its
            positions mean something else in rows of another length, or its weights are not finite.
    """
    model.train(False)
    model.set_attn_implementation("eager")
    name = type(model).__name__
    rows = [_row(num, group, model) for group, num in enumerate((_probed_length(model.config, length), _SHORT_ROW))]
    expected = torch.cat([_own_logprobs(model, row) for row in rows])
    if bool(expected.isnan().any()):
        raise ModelError(f"the log-probs of {name} are not finite: its weights are damaged, take another model")
    difference = float((_packed_logprobs(model, rows) - expected)[expected.isfinite()].abs().max())
    if not difference <= _TOLERANCE:
        raise ModelError(
            f"log-probs of {name} in packed rows of up to {counted(len(rows[0].token_ids), 'token')} differ from "
            "its own by "
            f"{difference:.3g}, at most {_TOLERANCE} is rounding: take a dense Llama- or Qwen-like model"
        )
    _refuse_growing_rope(model.config, length=length, probed=len(rows[0].token_ids))


def _probed_length(config: PretrainedConfig, length: int) -> int:
    heads = int(getattr(config.get_text_config(), "num_attention_heads", None) or 1)
    return max(_SHORT_ROW, min(length, _MAX_TOKENS, math.isqrt(_MAX_SCORES // heads)))


def _row(num_tokens: int, group: int, model: PreTrainedModel) -> PackRow:
    """Tokens from all over the vocabulary; 7919 is a prime."""
    ids = 1 + np.arange(num_tokens, dtype=np.int64) * 7919 % max(1, int(model.config.get_text_config().vocab_size) - 1)
    trained = np.union1d(np.arange(1, _SHORT_ROW), np.arange(max(1, num_tokens - _NUM_COMPARED), num_tokens))
    return PackRow(token_ids=ids.astype(np.int32), trained=trained, group=group)


@torch.no_grad()
def _own_logprobs(model: PreTrainedModel, row: PackRow) -> Tensor:
    """[E] by the model's own forward pass, of the row alone."""
    ids = torch.from_numpy(row.token_ids).long().to(model.device)
    before = torch.from_numpy(row.trained - 1).to(model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(ids[None], logits_to_keep=before, use_cache=False).logits[0]
    else:
        logits = model(ids[None], use_cache=False).logits[0].index_select(0, before)
    logprobs: Tensor = logits.float().log_softmax(-1).gather(-1, ids[before + 1, None]).squeeze(-1)
    return logprobs


def _packed_logprobs(model: PreTrainedModel, rows: Sequence[PackRow]) -> Tensor:
    """[E] of all rows in one micro-batch; `model` is switched to packed attention for good."""
    (batch,) = pack(rows, budget=sum(len(row.token_ids) for row in rows), device=model.device)
    assert list(batch.rows) == [0, 1], "rows keep their order"
    try:
        use_packed_attention(model)
        return token_logprobs(model, batch)
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} does not compute packed rows ({error}): take a dense Llama- or Qwen-like model"
        ) from error


def _refuse_growing_rope(config: PretrainedConfig, *, length: int, probed: int) -> None:
    """Beyond the compared length only the settings tell: there, these frequencies depend on the whole sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind in _GROWING_ROPE and length > probed:
        raise ModelError(
            f"rotary embedding {kind!r} depends on the length of a sequence, and rows may have "
            f"{counted(length, 'token')}: "
            f"lower env.max_trajectory_tokens to at most {probed}, or take a model with fixed frequencies"
        )
