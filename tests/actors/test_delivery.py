"""New weights reach an engine, and where they do not, it is seen: delivery broken on purpose, on real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engines import make_engine, make_model, prompt, reference_of, weights_of
from transformers import PreTrainedModel

from rexrag.actors.delivery import deliver
from rexrag.engine.llama_weights import LlamaWeights
from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.torch_engine import TorchEngine
from rexrag.errors import EngineBrokenError, EnginePassError
from rexrag.model.weight_proof import Delivery, WeightProof, WeightUpdate, bit_sum, canary_of, distance
from rexrag.types import WeightVersion

VERSION = WeightVersion(incarnation="1", step=7)
Fill = Callable[[LlamaWeights, Mapping[str, Any]], None]


def update_of(new: PreTrainedModel, old: PreTrainedModel, **changes: Any) -> WeightUpdate:  # noqa: ANN401
    canary = canary_of([prompt(30), prompt(5, seed=1), prompt(12, seed=2)])
    scores, before = (tuple(reference_of(model, ids[:1], ids[1:]) for ids in canary) for model in (new, old))
    weights = weights_of(new)
    proof = WeightProof(
        canary=canary,
        logprobs=scores,
        moved=distance(before, scores),
        bits=bit_sum(weights.values()),
        dtype="float32",
        precision="float32",
    )
    return WeightUpdate(**{"weights": weights, "proof": proof, **changes})


def run(engine: TorchEngine, update: WeightUpdate | None) -> Delivery | None:
    async def switch() -> Delivery | None:
        try:
            return await deliver(engine, VERSION, update, actor_id="rollout-3")
        finally:
            await engine.close()

    return asyncio.run(switch())


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Of step 6 and of step 7."""
    return make_model(request.param, seed=0), make_model(request.param, seed=1)


def test_weights_that_arrive_are_proven(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    old, new = models
    engine = make_engine(old)
    delivery = run(engine, update_of(new, old))
    assert delivery is not None
    assert delivery.is_told_apart
    assert 0.0 <= delivery.canary_kl < 1e-9
    assert engine.version == VERSION


def test_a_version_without_new_weights_needs_no_proof(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    engine = make_engine(models[0])
    assert run(engine, None) is None
    assert engine.version == VERSION


def ignored(self: LlamaWeights, weights: Mapping[str, Any]) -> None:
    """An old version is served."""


def without_one(name: str) -> Fill:
    real = LlamaWeights._fill

    def fill(self: LlamaWeights, weights: Mapping[str, Any]) -> None:
        kept = self._targets.pop(name)
        real(self, weights)
        self._targets[name] = kept

    return fill


def without_the_head(self: LlamaWeights, weights: Mapping[str, Any]) -> None:
    """The head that lies packed apart is not packed again."""
    for name, target in self._targets.items():
        target.copy_(torch.from_numpy(np.array(weights[name])))
    for names, linear in self._fused.items():
        if linear is not self.head:
            linear.load(self._stack(names, weights))


@pytest.mark.parametrize(
    ("fill", "told"),
    [
        pytest.param(ignored, "canary", id="an old version is served"),
        pytest.param(without_the_head, "canary|bits", id="the head is not packed again"),
        pytest.param(without_one("model.layers.1.input_layernorm.weight"), "canary|bits", id="a parameter is left out"),
    ],
)
def test_weights_that_do_not_arrive_are_noticed(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, fill: Fill, told: str
) -> None:
    old, new = models
    # Norms are all one in a new model: with an equal parameter nothing would be missing.
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "norm" in name:
                parameter.mul_(1.25)
    engine = make_engine(old)
    monkeypatch.setattr(LlamaWeights, "_fill", torch.inference_mode()(fill))
    with pytest.raises(EngineBrokenError, match=rf"engine of rollout-3 .* step 7, given twice: .*({told})"):
        run(engine, update_of(new, old))


def test_a_transfer_that_failed_once_is_repeated(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = models
    engine = make_engine(old)
    real, calls = LlamaWeights._fill, []

    def fill(self: LlamaWeights, weights: Mapping[str, Any]) -> None:
        calls.append(1)
        if len(calls) > 1:
            real(self, weights)

    monkeypatch.setattr(LlamaWeights, "_fill", fill)
    assert run(engine, update_of(new, old)) is not None
    assert len(calls) == 2


def test_the_bits_tell_what_the_canary_cannot(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """One entry of one matrix has moved by its last bit."""
    old, _ = models
    changed = weights_of(old)
    name = "model.layers.0.mlp.down_proj.weight"
    moved = changed[name].copy()
    moved[0, 0] = np.nextafter(moved[0, 0], np.float32(np.inf))
    update = update_of(old, old)
    proof = update.proof
    assert proof.moved == 0.0
    lie = WeightUpdate(weights={**changed, name: moved}, proof=proof)
    with pytest.raises(EngineBrokenError, match="bits of its weights add up to"):
        run(make_engine(old), lie)


def in_half(model: PreTrainedModel) -> PreTrainedModel:
    return torch.nn.Module.to(model, torch.bfloat16)


def test_an_engine_of_another_precision_than_weights_travel_in_proves_them_by_the_canary(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """Of a fleet on unlike processors one engine may sample in bfloat16 where float32 travels for the others."""
    old, new = models
    update, before = update_of(new, old), weights_of(old)
    with pytest.raises(EngineBrokenError, match=r"canary|bits"):
        run(make_engine(in_half(old), dtype="bfloat16"), update)
    seen = WeightUpdate(weights=update.weights, proof=update.proof.seen_in("bfloat16"))
    assert run(make_engine(in_half(old), dtype="bfloat16"), seen) is not None
    assert update.proof.seen_in("float32") is update.proof
    stays = WeightUpdate(weights=before, proof=seen.proof)
    with pytest.raises(EngineBrokenError, match="canary"):
        run(make_engine(in_half(old), dtype="bfloat16"), stays)


def test_a_pass_over_the_canary_that_fails_costs_an_attempt(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = models
    generate, num_failures = TorchEngine.generate, 1

    async def failing(self: TorchEngine, request: GenerateRequest) -> Any:  # noqa: ANN401
        nonlocal num_failures
        if num_failures:
            num_failures -= 1
            raise EnginePassError("out of memory")
        return await generate(self, request)

    monkeypatch.setattr(TorchEngine, "generate", failing)
    assert run(make_engine(old), update_of(new, old)) is not None
    num_failures = 2
    with pytest.raises(EngineBrokenError, match=r"its pass over the canary failed \(out of memory\)"):
        run(make_engine(old), update_of(new, old))


def test_without_bits_an_update_that_hardly_moves_the_canary_is_not_told_apart(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(self: TorchEngine) -> None:
        """Of an engine that packs its weights away."""

    monkeypatch.setattr(TorchEngine, "bit_sum", unreadable)
    old, new = models
    delivery = run(make_engine(old), update_of(old, old))
    assert delivery is not None
    assert not delivery.is_told_apart
    delivery = run(make_engine(old), update_of(new, old))
    assert delivery is not None
    assert delivery.is_told_apart


def test_the_sum_of_bits_knows_no_layout() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(7, 5)).astype(np.float32) for _ in range(2))
    wanted = int(one.view(np.uint32).astype(np.uint64).sum() + other.view(np.uint32).astype(np.uint64).sum())
    assert bit_sum([one, other]) == wanted
    assert bit_sum([torch.from_numpy(np.concatenate([one, other])).T]) == wanted
    assert bit_sum([torch.from_numpy(one)[:3], one[3:], other]) == wanted
    half = torch.from_numpy(one).bfloat16()
    bits = half.view(torch.int16).numpy().view(np.uint16)
    assert bit_sum([half]) == bit_sum([bits]) == int(bits.astype(np.uint64).sum())


def test_the_canary_is_one_long_prompt_and_the_ends_of_others() -> None:
    canary = canary_of([prompt(40, seed=1), prompt(300), prompt(3, seed=2), prompt(20, seed=3)])
    assert [len(ids) for ids in canary] == [64, 16, 16]
    assert canary[0] == tuple(prompt(300)[-64:])
    assert [len(ids) for ids in canary_of([prompt(3, seed=2), [5], prompt(20, seed=3)])] == [20, 3]
    assert canary_of([]) == ()
