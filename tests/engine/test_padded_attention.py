"""Attention of the engine on a GPU, whose rectangle is the same on any device."""

from __future__ import annotations

import asyncio
import math
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_engines import generate_all, make_engine, make_model, prompt, reference_of
from torch import Tensor

from rexrag.engine.llama_weights import LlamaShape
from rexrag.engine.padded_attention import PaddedRows
from rexrag.engine.protocol import GenerateRequest

CPU = torch.device("cpu")
SHAPE = LlamaShape(
    width=24,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    feed_forward=8,
    vocab_size=9,
    norm_eps=1e-5,
    tied_head=True,
)


def one_by_one(spans: list[tuple[int, int, int]], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[T, H E] each token and head by itself."""
    rows = []
    token = 0
    for slot, start, end in spans:
        for position in range(start, end):
            heads = []
            for head in range(SHAPE.num_heads):
                kv_head = head // (SHAPE.num_heads // SHAPE.num_kv_heads)
                scores = keys[slot, kv_head, : position + 1] @ queries[token, head] / math.sqrt(SHAPE.head_dim)
                heads.append(scores.softmax(0) @ values[slot, kv_head, : position + 1])
            rows.append(torch.cat(heads))
            token += 1
    return torch.stack(rows)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 0, 1)],
        [(1, 4, 5), (3, 12, 13), (4, 0, 1)],
        [(2, 0, 5), (0, 3, 4), (4, 9, 13)],
    ],
)
def test_each_token_reads_its_sequence_up_to_itself(spans: list[tuple[int, int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 5, SHAPE.num_kv_heads, 13, SHAPE.head_dim, generator=generator)
    num_tokens = sum(end - start for _, start, end in spans)
    queries = torch.randn(num_tokens, SHAPE.num_heads, SHAPE.head_dim, generator=generator)
    rows = PaddedRows(spans, first=7, shape=SHAPE, dtype=torch.float32, device=CPU)
    assert rows.tokens == slice(7, 7 + num_tokens)
    attended = rows.attend(queries, keys=keys, values=values)
    torch.testing.assert_close(attended, one_by_one(spans, queries, keys, values))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_on_a_gpu_samples_what_the_model_says(dtype: Literal["float32", "bfloat16"]) -> None:
    model = make_model("qwen3")
    requests = [
        GenerateRequest(
            prompt_ids=prompt(5 + 9 * i, seed=i), max_tokens=30, seed=i, cache_salt=str(i % 2), score_from=3
        )
        for i in range(7)
    ]
    engine = make_engine(model, dtype=dtype, max_sequences=3, device="cuda")
    results = asyncio.run(generate_all(engine, *requests))
    for request, result in zip(requests, results, strict=True):
        expected = reference_of(model, request.prompt_ids, result.token_ids)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-3 if dtype == "float32" else 0.3)
        scores = reference_of(model, request.prompt_ids[:3], request.prompt_ids[3:])
        np.testing.assert_allclose(result.scores, scores, atol=1e-3 if dtype == "float32" else 0.3)
