"""What only the engine over vLLM has: its core's books, its limits, and weights that did not arrive."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from engine_harness import Case, Harness, cases, opened
from tiny_engines import V0, V1, Letters, make_model, make_vllm_engine, needs_vllm, prompt, reference_of, weights_of

from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.vllm_engine import VllmEngine
from rexrag.errors import EngineBrokenError, ModelError
from rexrag.model.weight_proof import bit_sum


def engine_of(harness: Harness) -> VllmEngine:
    assert isinstance(harness.engine, VllmEngine)
    return harness.engine


@pytest.fixture(
    scope="module", params=[case for case in cases(("qwen2", "recompute")) if case.values[0].kind == "vllm"]
)
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    case: Case = request.param
    with opened(case, tmp_path_factory.mktemp("model")) as harness:
        yield harness


def test_the_core_lets_go_of_cancelled_requests(harness: Harness) -> None:
    draws = random.Random(1)

    async def run() -> None:
        requests = [harness.request(prompt(draws.randint(1, 600), seed=i), max_tokens=90, seed=i) for i in range(64)]
        tasks = [asyncio.create_task(harness.engine.generate(request)) for request in requests]
        for task in draws.sample(tasks, len(tasks)):
            await asyncio.sleep(0.01 * draws.random())
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await harness.engine.generate(harness.request([1], max_tokens=1))

    harness.run(run())
    assert engine_of(harness)._core.num_unfinished() == 0


def test_a_new_version_is_a_preemption_under_recompute_and_the_cache_is_seen_in_use(harness: Harness) -> None:
    async def run() -> None:
        request = harness.request(prompt(200), max_tokens=60)
        task = asyncio.create_task(harness.engine.generate(request))
        before = harness.engine.stats()
        while harness.engine.stats().sampled_tokens < before.sampled_tokens + 5:
            await asyncio.sleep(0)
        during = harness.engine.stats()
        assert during.running == 1
        assert 0 < during.cache_use <= 1
        assert during.forward_s > before.forward_s
        await harness.change_to(0)
        await task
        assert harness.engine.stats().preemptions == before.preemptions + 1

    harness.run(run())


def test_the_bits_of_weights_that_are_repacked_cannot_be_read(harness: Harness) -> None:
    engine = engine_of(harness)
    harness.run(harness.change_to(1))
    assert harness.run(engine.bit_sum()) is None


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize(("architecture", "dtype"), [("qwen3", "bfloat16"), ("llama", "float32")])
def test_the_bits_of_weights_that_are_not_repacked_are_read(
    architecture: str, dtype: Literal["float32", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where vLLM fuses layers and pads the vocabulary, and keeps what it is given."""
    from vllm.model_executor.layers import utils  # there is no vLLM where this does not run

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = cast("Any", torch.nn.functional.linear)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    models = [make_model(architecture, head_dim=32, seed=seed).to(getattr(torch, dtype)) for seed in (0, 1)]
    bits = {"float32": torch.float32, "bfloat16": torch.uint16}[dtype]  # numpy has no bfloat16

    async def run() -> None:
        engine = make_vllm_engine(models[0], folder=tmp_path, codec=Letters(), dtype=dtype)
        assert await engine.bit_sum() is None, "nothing has shown yet that they can be read"
        for model in reversed(models):
            weights = {name: p.detach().view(bits).numpy().copy() for name, p in model.named_parameters()}
            await engine.update_weights(V1, weights)
            assert await engine.bit_sum() == bit_sum(weights.values())
        engine._core._client.collective_rpc(lambda worker: change_one_bit(worker.model_runner.get_model()))
        assert await engine.bit_sum() != bit_sum(weights.values())
        await engine.close()

    asyncio.run(run())


def change_one_bit(model: torch.nn.Module) -> None:
    parameter = max(model.parameters(), key=torch.Tensor.numel)
    parameter.data.flatten()[0] *= 2


@pytest.mark.vllm
@needs_vllm
def test_bfloat16_stays_near_the_bfloat16_model(tmp_path: Path) -> None:
    model = make_model("qwen3", head_dim=32).bfloat16()

    async def run() -> None:
        engine = make_vllm_engine(model, folder=tmp_path, codec=Letters(), dtype="bfloat16")
        request = GenerateRequest(prompt_ids=prompt(20), max_tokens=40)
        result = await engine.generate(request)
        await engine.close()
        expected = reference_of(model, request.prompt_ids, result.token_ids)
        assert np.abs(np.array(result.logprobs) - expected).mean() < 0.05

    asyncio.run(run())


@pytest.mark.parametrize("case", [case for case in cases(("llama", "keep")) if case.values[0].kind == "vllm"])
def test_a_weight_that_did_not_arrive_ends_the_engine(case: Case, tmp_path: Path) -> None:
    """Nobody would know what it samples from."""
    name = "model.layers.1.mlp.down_proj.weight"
    with opened(case, tmp_path) as harness:
        engine = engine_of(harness)
        incomplete = {key: value for key, value in weights_of(harness.models[1]).items() if key != name}
        del engine._sizes[name]
        with pytest.raises(EngineBrokenError, match=rf"kept 1 old weights, such as {name}"):
            harness.run(engine.update_weights(V1, incomplete))
        assert engine.version == V0
        with pytest.raises(EngineBrokenError, match="the engine is dead"):
            harness.run(engine.generate(harness.request([1])))


def test_heads_that_it_cannot_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"8 dimensions, and vLLM on CPUs has only 32, .*rollout\.engine = \"torch\""):
        make_vllm_engine(make_model("llama"), folder=tmp_path, codec=Letters())
