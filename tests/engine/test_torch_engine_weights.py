"""Weight changes between passes (§3): what `keep` and `recompute` promise, to the token."""

from __future__ import annotations

import asyncio
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_engines import V0, V1, make_engine, make_model, prompt, reference_of, weights_of
from transformers import DynamicCache, PreTrainedModel

from rexrag.engine.packed_linear import PackedLinear
from rexrag.engine.protocol import EngineClosedError, GenerateRequest, Generation
from rexrag.engine.torch_engine import TorchEngine
from rexrag.errors import EngineBrokenError

OLD, NEW = 0, 1


def requests() -> list[GenerateRequest]:
    """Two that share a prompt, and two that do not."""
    shared = [GenerateRequest(prompt_ids=prompt(30), max_tokens=40, seed=seed, cache_salt="s") for seed in (1, 2)]
    return [
        *shared,
        GenerateRequest(prompt_ids=prompt(7, seed=3), max_tokens=30, seed=3, cache_salt="t"),
        GenerateRequest(prompt_ids=prompt(50, seed=4), max_tokens=35, seed=4, cache_salt="u", greedy=True),
    ]


async def run_across_a_change(
    engine: TorchEngine, weights: dict[str, npt.NDArray[np.generic]], *, after: int
) -> list[Generation]:
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests()]
    while engine.stats().sampled_tokens < after:
        await asyncio.sleep(0)
    await engine.update_weights(V1, weights)
    assert engine.version == V1
    results = await asyncio.gather(*tasks)
    await engine.close()
    return list(results)


def test_an_engine_that_has_loaded_some_of_the_weights_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU's memory ends half-way: nobody knows which weights a pass would have."""
    models = [make_model("llama", seed=seed) for seed in range(2)]

    async def run() -> None:
        engine = make_engine(models[OLD])
        request = GenerateRequest(prompt_ids=prompt(9), max_tokens=40)
        pending = asyncio.create_task(engine.generate(request))
        while not engine.stats().sampled_tokens:
            await asyncio.sleep(0)
        load = PackedLinear.load

        def fail(linear: PackedLinear, weight: torch.Tensor) -> None:
            monkeypatch.setattr(PackedLinear, "load", load)
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(PackedLinear, "load", fail)
        with pytest.raises(EngineBrokenError, match=r"holds a mixture of weights.*out of memory"):
            await engine.update_weights(V1, weights_of(models[NEW]))
        for work in (pending, engine.generate(request), engine.update_weights(V1, weights_of(models[NEW]))):
            with pytest.raises(EngineBrokenError, match="mixture"):
                await work
        await engine.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def incremental_logprobs(models: dict[int, PreTrainedModel], prompt_ids: list[int], result: Generation) -> list[float]:
    """One pass per token over a transformers cache, each under the weights of the token that it gives.

    The prompt but for its last token was computed, or copied from a sequence that did, before the change.
    """
    cache = DynamicCache()
    with torch.inference_mode():
        models[OLD](torch.tensor([prompt_ids[:-1]]), past_key_values=cache)
    inputs, logprobs = prompt_ids[-1:], []
    for token, version in zip(result.token_ids, result.versions, strict=True):
        with torch.inference_mode():
            logits = models[version](torch.tensor([inputs]), past_key_values=cache).logits[0, -1]
        logprobs.append(float(logits.log_softmax(-1)[token]))
        inputs = [token]
    return logprobs


@pytest.fixture(scope="module")
def models() -> dict[int, PreTrainedModel]:
    return {OLD: make_model("qwen3", seed=1), NEW: make_model("qwen3", seed=2)}


@pytest.mark.parametrize("after", [1, 20, 60])
def test_keep_goes_on_over_old_keys_and_records_what_it_sampled_from(
    models: dict[int, PreTrainedModel], after: int
) -> None:
    engine = make_engine(models[OLD], inflight="keep", endless=True)
    results = asyncio.run(run_across_a_change(engine, weights_of(models[NEW]), after=after))
    assert any(set(result.versions) == {OLD, NEW} for result in results)
    for request, result in zip(requests(), results, strict=True):
        assert result.versions == sorted(result.versions)
        expected = incremental_logprobs(models, list(request.prompt_ids), result)
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("after", [1, 20, 60])
def test_recompute_equals_a_full_forward_under_the_tokens_own_version(
    models: dict[int, PreTrainedModel], after: int
) -> None:
    engine = make_engine(models[OLD], inflight="recompute", endless=True)
    results = asyncio.run(run_across_a_change(engine, weights_of(models[NEW]), after=after))
    assert any(set(result.versions) == {OLD, NEW} for result in results)
    for request, result in zip(requests(), results, strict=True):
        versions = np.array(result.versions)
        for version, model in models.items():
            expected = reference_of(model, request.prompt_ids, result.token_ids)
            chosen = versions == version
            np.testing.assert_allclose(np.array(result.logprobs)[chosen], expected[chosen], atol=1e-4)


@pytest.mark.parametrize("inflight", ["keep", "recompute"])
def test_a_later_salt_reads_nothing_of_the_old_version(
    models: dict[int, PreTrainedModel], inflight: Literal["keep", "recompute"]
) -> None:
    async def run() -> None:
        engine = make_engine(models[OLD], inflight=inflight)
        before = await engine.generate(GenerateRequest(prompt_ids=prompt(20), max_tokens=3, cache_salt="0"))
        await engine.update_weights(V1, weights_of(models[NEW]))
        ids = [*prompt(20), *before.token_ids, 5]
        new_salt = await engine.generate(GenerateRequest(prompt_ids=ids, max_tokens=5, score_from=21, cache_salt="1"))
        np.testing.assert_allclose(new_salt.logprobs, reference_of(models[NEW], ids, new_salt.token_ids), atol=1e-4)
        np.testing.assert_allclose(new_salt.scores, reference_of(models[NEW], ids[:21], ids[21:]), atol=1e-4)
        assert set(new_salt.versions) | set(new_salt.score_versions) == {1}
        reused = engine.stats().reused_tokens
        assert reused == 0
        await engine.generate(GenerateRequest(prompt_ids=ids, max_tokens=2, cache_salt="0"))
        assert (engine.stats().reused_tokens > 0) == (inflight == "keep")
        await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("name", ["llama", "llama-untied-biased-llama3rope", "qwen2", "qwen3"])
def test_every_weight_is_replaced(name: str) -> None:
    old, new = make_model(name, seed=1), make_model(name, seed=2)

    async def run() -> Generation:
        engine = make_engine(old)
        await engine.update_weights(V1, weights_of(new))
        result = await engine.generate(GenerateRequest(prompt_ids=prompt(10), max_tokens=8))
        await engine.close()
        return result

    result = asyncio.run(run())
    np.testing.assert_allclose(result.logprobs, reference_of(new, prompt(10), result.token_ids), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_bits_and_read_only_arrays_are_taken(dtype: Literal["float32", "bfloat16"]) -> None:
    new = make_model("llama", seed=2)
    bits: dict[str, npt.NDArray[np.generic]] = {}
    for name, parameter in new.named_parameters():
        rounded = parameter.detach().bfloat16()
        bits[name] = rounded.view(torch.uint16).numpy()
        parameter.data.copy_(rounded)
    for array in bits.values():
        array.setflags(write=False)

    async def run(weights: dict[str, npt.NDArray[np.generic]]) -> Generation:
        engine = make_engine(make_model("llama", seed=1), dtype=dtype)
        await engine.update_weights(V1, weights)
        result = await engine.generate(GenerateRequest(prompt_ids=prompt(10), max_tokens=8))
        await engine.close()
        return result

    from_bits = asyncio.run(run(bits))
    assert from_bits == asyncio.run(run(weights_of(new)))
    if dtype == "float32":
        expected = reference_of(new, prompt(10), from_bits.token_ids)
        np.testing.assert_allclose(from_bits.logprobs, expected, atol=1e-4)


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = make_model("llama")
    good = weights_of(make_model("llama", seed=5))
    name = "model.layers.0.mlp.up_proj.weight"
    bad = [
        ({key: value for key, value in good.items() if key != name}, f"missing, such as {name}"),
        ({**good, "lm_head.weight": good[name]}, "unknown, such as lm_head.weight"),
        ({**good, name: good[name].T}, f"weight {name} has shape"),
        ({**good, name: good[name].astype(np.float64)}, f"weight {name} is float64"),
    ]

    async def run() -> Generation:
        engine = make_engine(model)
        for weights, message in bad:
            with pytest.raises(ValueError, match=message):
                await engine.update_weights(V1, weights)
        assert engine.version == V0
        result = await engine.generate(GenerateRequest(prompt_ids=prompt(10), max_tokens=8))
        await engine.close()
        with pytest.raises(EngineClosedError):
            await engine.update_weights(V1, good)
        return result

    result = asyncio.run(run())
    np.testing.assert_allclose(result.logprobs, reference_of(model, prompt(10), result.token_ids), atol=1e-4)


def test_a_step_that_changed_nothing_gives_a_version_and_costs_nothing(models: dict[int, PreTrainedModel]) -> None:
    async def run() -> None:
        engine = make_engine(models[OLD], inflight="recompute")
        first = await engine.generate(GenerateRequest(prompt_ids=prompt(20), max_tokens=3))
        await engine.update_weights(V1, None)
        ids = [*prompt(20), *first.token_ids, 5]
        second = await engine.generate(GenerateRequest(prompt_ids=ids, max_tokens=3))
        assert engine.stats().reused_tokens == len(ids) - 2
        assert set(second.versions) == {V1.step}
        np.testing.assert_allclose(second.logprobs, reference_of(models[OLD], ids, second.token_ids), atol=1e-4)
        await engine.close()

    asyncio.run(run())
