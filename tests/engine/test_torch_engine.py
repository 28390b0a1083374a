"""What the engine samples and scores equals the transformers model, whatever else is in the batch."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from plain_settings import engine_settings
from tiny_engines import (
    EOS_ID,
    V0,
    VOCAB_SIZE,
    Letters,
    build,
    generate_all,
    make_engine,
    make_model,
    prompt,
    reference_logprobs,
    reference_of,
)
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from rexrag.engine.protocol import EngineClosedError, GenerateRequest
from rexrag.engine.torch_engine import TorchEngine
from rexrag.errors import EnginePassError, ModelError
from rexrag.model.loading import fastest_dtype

ARCHITECTURES = ["llama", "llama-untied-biased-llama3rope", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampled_logprobs_equal_a_transformers_forward(name: str) -> None:
    model = make_model(name)
    requests = [
        GenerateRequest(prompt_ids=prompt(3 + 9 * i, seed=i), max_tokens=4 + 3 * i, seed=i, cache_salt=str(i))
        for i in range(6)
    ]
    for request, result in zip(requests, asyncio.run(generate_all(make_engine(model), *requests)), strict=True):
        expected = reference_of(model, request.prompt_ids, result.token_ids)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
        assert result.versions == [0] * len(result.token_ids)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_takes_the_likeliest_token(name: str) -> None:
    model = make_model(name)
    request = GenerateRequest(prompt_ids=prompt(11), max_tokens=12, greedy=True)
    (result,) = asyncio.run(generate_all(make_engine(model), request))
    logprobs = reference_logprobs(model, [*request.prompt_ids, *result.token_ids])
    assert result.token_ids == logprobs[10 : 10 + len(result.token_ids)].argmax(-1).tolist()
    np.testing.assert_allclose(result.logprobs, reference_of(model, request.prompt_ids, result.token_ids), atol=1e-4)


def test_bfloat16_stays_near_the_bfloat16_model() -> None:
    model = make_model("qwen3")
    request = GenerateRequest(prompt_ids=prompt(20), max_tokens=20)
    (result,) = asyncio.run(generate_all(make_engine(model, dtype="bfloat16"), request))
    half: PreTrainedModel = model.bfloat16()
    expected = reference_of(half, request.prompt_ids, result.token_ids)
    assert np.abs(np.array(result.logprobs) - expected).mean() < 0.15


def test_draws_do_not_depend_on_the_batch() -> None:
    model = make_model("llama")
    requests = [
        GenerateRequest(prompt_ids=prompt(5 + i, seed=i), max_tokens=20, seed=7 * i, cache_salt=str(i))
        for i in range(9)
    ]
    alone = [asyncio.run(generate_all(make_engine(model), request))[0] for request in requests]
    together = asyncio.run(generate_all(make_engine(model, max_sequences=4), *requests))
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]


def test_another_seed_draws_other_tokens() -> None:
    requests = [GenerateRequest(prompt_ids=prompt(8), max_tokens=20, seed=seed) for seed in range(2)]
    first, second = asyncio.run(generate_all(make_engine(make_model("llama")), *requests))
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("length", [40, 700])
def test_scores_are_those_of_one_forward_pass(length: int) -> None:
    model = make_model("llama")
    ids = prompt(length)
    requests = [GenerateRequest(prompt_ids=prompt(600, seed=1), max_tokens=2, cache_salt="other")]
    requests += [
        GenerateRequest(prompt_ids=ids, max_tokens=3, score_from=start, cache_salt="s")
        for start in (1, length // 2, length - 1, length)
    ]
    _, *results = asyncio.run(generate_all(make_engine(model, max_length=1000), *requests))
    expected = reference_of(model, ids[:1], ids[1:])
    for request, result in zip(requests[1:], results, strict=True):
        assert request.score_from is not None
        np.testing.assert_allclose(result.scores, expected[request.score_from - 1 :], atol=1e-4)
        assert result.score_versions == [0] * (length - request.score_from)
        np.testing.assert_allclose(result.logprobs, reference_of(model, ids, result.token_ids), atol=1e-4)


def test_generations_end_by_stop_end_of_text_or_length() -> None:
    model = make_model("llama")
    request = GenerateRequest(prompt_ids=prompt(8), max_tokens=30, seed=3)
    (free,) = asyncio.run(generate_all(make_engine(model), request))
    text = Letters().decode(free.token_ids)
    stop = text[4:7]
    end = text.index(stop) + 3
    stopped = GenerateRequest(prompt_ids=prompt(8), max_tokens=30, seed=3, stop=("never there", stop))
    (result,) = asyncio.run(generate_all(make_engine(model), stopped))
    assert free.finish in ("length", "eos")
    assert (result.finish, result.token_ids) == ("stop", free.token_ids[:end])
    short = GenerateRequest(prompt_ids=prompt(8), max_tokens=2, seed=3)
    (result,) = asyncio.run(generate_all(make_engine(model), short))
    assert (result.finish, result.token_ids) == ("length", free.token_ids[:2])


def test_end_of_text_is_kept() -> None:
    requests = [GenerateRequest(prompt_ids=prompt(8), max_tokens=110, seed=seed) for seed in range(8)]
    results = asyncio.run(generate_all(make_engine(make_model("llama")), *requests))
    ended = [r for r in results if r.finish == "eos"]
    assert ended
    for result in results:
        assert (result.token_ids[-1] == EOS_ID) == (result.finish == "eos")
        assert EOS_ID not in result.token_ids[:-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 126}, "exceed max_length 128"),
        ({"prompt_ids": [1, 101]}, r"outside \[0, 101\)"),
        ({"prompt_ids": [-1]}, r"outside \[0, 101\)"),
        ({"score_from": 0}, "score_from 0"),
        ({"score_from": 4}, "score_from 4"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(fields: dict[str, Any], message: str) -> None:
    request = GenerateRequest(**{"prompt_ids": [1, 2, 3], "max_tokens": 2, **fields})
    with pytest.raises(ValueError, match=message):
        asyncio.run(generate_all(make_engine(make_model("llama")), request))


def test_whole_numbers_in_the_settings_of_yarn_are_as_good_as_any() -> None:
    rope: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4, "attention_factor": 1}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )  # fmt: skip
    model = build(config)
    request = GenerateRequest(prompt_ids=prompt(70), max_tokens=8, seed=1)
    [result] = asyncio.run(generate_all(make_engine(model), request))
    assert result.logprobs == pytest.approx(reference_of(model, request.prompt_ids, result.token_ids), abs=1e-5)


def unsupported_configs() -> list[tuple[PreTrainedConfig, str]]:
    small: dict[str, Any] = {
        "vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }  # fmt: skip
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    return [
        (GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1), "model type 'gpt2'"),
        (LlamaConfig(**small, hidden_act="gelu"), "activation 'gelu'"),
        (LlamaConfig(**small, rope_parameters=dynamic), "rotary embedding 'dynamic'"),
        (Qwen2Config(**small, **windows), "sliding-window"),
        (LlamaConfig(**small, max_position_embeddings=32), "context is 32 tokens, the run needs 64"),
    ]


@pytest.mark.parametrize(("config", "message"), unsupported_configs())
def test_models_it_cannot_run_are_refused(config: PreTrainedConfig, message: str) -> None:
    settings = engine_settings(max_sequences=2, max_length=64)
    with pytest.raises(ModelError, match=message):
        TorchEngine(build(config), settings=settings, codec=Letters(), version=V0)


def test_unmerged_adapters_are_refused() -> None:
    model = make_model("llama")
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="adapter is none of"):
        make_engine(model)


def test_a_failing_pass_fails_every_request_and_the_engine_goes_on() -> None:
    class Broken(Letters):
        def decode(self, ids: object) -> str:
            raise LookupError("no such token")

    settings = engine_settings(max_sequences=2, max_length=64)
    model = make_model("llama")

    async def run() -> None:
        engine = TorchEngine(model, settings=settings, codec=Broken(), version=V0)
        failing = [
            GenerateRequest(prompt_ids=prompt(5, seed=i), max_tokens=5, stop=("x",) if i == 0 else ()) for i in range(5)
        ]
        outcomes = await asyncio.gather(*(engine.generate(r) for r in failing), return_exceptions=True)
        assert all(isinstance(outcome, EnginePassError) and "no such token" in str(outcome) for outcome in outcomes)
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)
        good = await engine.generate(failing[1])
        np.testing.assert_allclose(good.logprobs, reference_of(model, failing[1].prompt_ids, good.token_ids), atol=1e-4)
        await engine.close()

    asyncio.run(run())


def test_diverged_weights_are_an_error_not_a_token() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(EnginePassError, match=r"FloatingPointError.*diverged"):
        asyncio.run(generate_all(make_engine(model), GenerateRequest(prompt_ids=[1], max_tokens=2)))


def test_a_cancelled_request_leaves_the_batch() -> None:
    async def run() -> None:
        engine = make_engine(make_model("llama"), max_sequences=2)
        long = [asyncio.create_task(engine.generate(GenerateRequest(prompt_ids=[i], max_tokens=120))) for i in range(3)]
        while engine.stats().sampled_tokens < 4:
            await asyncio.sleep(0.001)
        long[0].cancel()
        after = await engine.generate(GenerateRequest(prompt_ids=[9], max_tokens=2))
        assert len(after.token_ids) <= 2
        await asyncio.gather(*long, return_exceptions=True)
        assert long[0].cancelled()
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)
        await engine.close()

    asyncio.run(run())


def test_close_ends_what_is_pending() -> None:
    async def run() -> None:
        engine = make_engine(make_model("llama"), max_sequences=1)
        pending = [
            asyncio.create_task(engine.generate(GenerateRequest(prompt_ids=[i], max_tokens=120))) for i in (1, 2)
        ]
        while engine.stats().sampled_tokens < 1:
            await asyncio.sleep(0.001)
        await engine.close()
        outcomes = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(outcome, EngineClosedError) for outcome in outcomes)
        with pytest.raises(EngineClosedError):
            await engine.generate(GenerateRequest(prompt_ids=[1], max_tokens=1))
        await engine.close()

    asyncio.run(run())


def test_an_engine_that_was_never_used_closes() -> None:
    asyncio.run(make_engine(make_model("llama")).close())


def test_fastest_dtype_is_one_the_engine_takes() -> None:
    request = GenerateRequest(prompt_ids=[1, 2], max_tokens=3)
    (result,) = asyncio.run(generate_all(make_engine(make_model("llama"), dtype=fastest_dtype()), request))
    assert np.isfinite(result.logprobs).all()
