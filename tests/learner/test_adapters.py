"""A learner that trains adapters in place of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from learner_builders import (
    core,
    first_gradient,
    learner_spec,
    small_model,
    tiny_model,
    tokenizer,
)
from learner_builders import (
    mixed_batch as batch,
)
from peft import PeftModel
from plain_settings import correction_settings, learner_settings, loss_settings, optimizer_settings, probe_settings
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config

import rexrag.metrics as keys
from rexrag.errors import ModelError
from rexrag.learner.checkpoint import load_checkpoint
from rexrag.learner.learner_actor import LearnerActor
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.adapters import AdapterSettings, add_adapters, narrow_frozen, rounded, without_adapters
from rexrag.model.saving import save_model
from rexrag.processes import Share

ADAPTERS: Final = AdapterSettings(rank=4, alpha=6)
SETTINGS: Final = learner_settings(
    optimizer=optimizer_settings(learning_rate=1e-2, max_grad_norm=1e9),
    probe=probe_settings(filter="none"),
    correction=correction_settings(mixture="normalized"),
    loss=loss_settings(train_prefix=True, preserve=1.0),
)
CANARY: Final = ((1, 2, 3, 4, 9, 17), (5, 6, 7))
IDS: Final = torch.arange(1, 12)[None]


def adapted(*, trained: bool = False) -> PreTrainedModel:
    model: PreTrainedModel = tiny_model()
    torch.manual_seed(1)
    add_adapters(model, ADAPTERS)
    if trained:
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def merged_of(learner: LearnerCore) -> PreTrainedModel:
    """A plain model with the weights that the learner exports."""
    plain = tiny_model()
    weights = learner.export_weights(learner.weight_sizes, dtype="float32")
    plain.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
    return plain


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_that_of_the_weights_through_the_product(tmp_path: Path, checkpointing: bool) -> None:
    """At B = 0 it is (α/r)·G Aᵀ for B, with G the gradient of the weight, and 0 for A."""
    full = core(tmp_path, settings=SETTINGS)
    model = adapted()
    thin = core(tmp_path, settings=replace(SETTINGS, gradient_checkpointing=checkpointing), model=model)
    low = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_A." in name}
    full.step(batch(1))
    thin.step(batch(1))
    weights, ours = first_gradient(full), first_gradient(thin)
    assert len(low) == 14, "seven linear layers in each of two blocks"
    for name, a in low.items():
        wanted = ADAPTERS.alpha / ADAPTERS.rank * weights[name.replace("lora_A.default.", "")] @ a.T
        b = ours[name.replace("lora_A", "lora_B")]
        assert float((b - wanted).norm() / wanted.norm()) < 1e-5, name
    assert all(float(ours[name].norm()) == 0.0 for name in low)


def test_what_is_exported_and_saved_computes_what_the_learner_does(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=SETTINGS, model=adapted())
    for step in range(1, 4):
        assert learner.step(batch(step)).updated
    before = dict(tiny_model().named_parameters())
    weights = learner.export_weights(learner.weight_sizes, dtype="float32")
    assert list(weights) == list(before)
    assert learner.weight_sizes == {name: parameter.nbytes for name, parameter in before.items()}
    for name, parameter in before.items():
        is_adapted = name.endswith("proj.weight")
        assert np.array_equal(weights[name], parameter.detach().numpy()) != is_adapted, name
    one = core(tmp_path, settings=SETTINGS, model=merged_of(learner))
    for ours, theirs in zip(one.score(CANARY), learner.score(CANARY), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    narrow = learner.export_weights(weights, dtype="bfloat16")
    again = learner.export_weights(weights, dtype="bfloat16")
    for name, bits in narrow.items():
        assert np.array_equal(bits, again[name]), "a version is the same each time"
        assert (np.abs(floats(bits) - weights[name]) <= np.abs(weights[name]) * 2.0**-7).all()


def floats(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the bits of bfloat16 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_what_is_less_than_a_digit_arrives_in_the_mean() -> None:
    """As an adapter's part is at first: rounded to the nearest, none of it would."""
    weight = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    added = weight.float() * 2.0**-11
    merged = weight.float() + added
    assert torch.equal(merged.bfloat16(), weight)
    arrived = rounded(merged, seed=1).float() - weight.float()
    assert float((arrived * weight.float()).sum() / (added * weight.float()).sum()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(rounded(weight.float(), seed=1), weight), "what is a bfloat16 number stays"
    assert torch.equal(rounded(merged, seed=1), rounded(merged, seed=1))
    assert not torch.equal(rounded(merged, seed=1), rounded(merged, seed=2))


def test_the_reference_is_the_model_without_them(tmp_path: Path) -> None:
    model = adapted(trained=True)
    assert not torch.equal(logits_of(model), logits_of(tiny_model()))
    with without_adapters(model):
        assert torch.equal(logits_of(model), logits_of(tiny_model()))
    assert not torch.equal(logits_of(model), logits_of(tiny_model()))

    with_kl = replace(SETTINGS, loss=loss_settings(train_prefix=True, kl_coef=0.1))
    learner = core(tmp_path, settings=with_kl, model=adapted())
    assert learner.step(batch(1)).metrics[keys.POLICY_KL_REF] == 0.0
    # The same weights beside a second model.
    plain = merged_of(learner)
    two = core(tmp_path, settings=with_kl, model=plain, reference=tiny_model())
    two.num_steps = 1
    kl = learner.step(batch(2)).metrics[keys.POLICY_KL_REF]
    assert kl is not None
    assert kl > 0
    assert two.step(batch(2)).metrics[keys.POLICY_KL_REF] == pytest.approx(kl, rel=1e-4)
    with pytest.raises(ValueError, match="at 0 and with adapters none"):
        core(tmp_path, settings=with_kl, model=adapted(), reference=tiny_model())


def test_in_bfloat16_the_frozen_weights_are_kept_narrow_at_no_loss(tmp_path: Path) -> None:
    wide, narrow = adapted(trained=True), adapted(trained=True)
    narrow_frozen(narrow, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits_of(wide), logits_of(narrow))

    learner = core(tmp_path, settings=replace(SETTINGS, autocast="bfloat16"), model=adapted())
    dtypes = {name.rpartition("proj.")[2]: p.dtype for name, p in learner.model.named_parameters() if "proj" in name}
    assert dtypes == {
        "base_layer.weight": torch.bfloat16,
        "lora_A.default.weight": torch.float32,
        "lora_B.default.weight": torch.float32,
    }
    assert learner.step(batch(1)).updated
    assert all(
        array.dtype == np.float32 for array in learner.export_weights(learner.weight_sizes, dtype="float32").values()
    )


def assert_same(one: LearnerCore, other: LearnerCore) -> None:
    ours, theirs = one.trainer_state(), other.trainer_state()
    assert ours.adapters.keys() == theirs.adapters.keys()
    assert all(torch.equal(tensor, theirs.adapters[name]) for name, tensor in ours.adapters.items())
    assert all(torch.equal(tensor, theirs.optimizer[name]) for name, tensor in ours.optimizer.items())
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def actor(tmp_path: Path, settings: LearnerSettings, **fields: object) -> LearnerActor:
    learner = LearnerActor(
        learner_spec(tmp_path, settings=settings, adapters=ADAPTERS, **fields), share=Share(threads=1)
    )
    learner.ready()
    return learner


def with_biases() -> PreTrainedModel:
    """Whose small weights are no round numbers."""
    model = small_model(Qwen2Config, max_position_embeddings=256, tie_word_embeddings=False)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("autocast", ["float32", "bfloat16"])
def test_a_checkpoint_goes_on_bit_for_bit_and_is_what_others_read(tmp_path: Path, autocast: Any) -> None:  # noqa: ANN401
    settings = replace(SETTINGS, autocast=autocast)
    save_model(with_biases(), tokenizer(), tmp_path / "model")
    straight = actor(tmp_path, settings)
    straight.step(batch(1))
    straight.step(batch(2))
    saved = straight.save(tmp_path / "checkpoints")
    straight.step(batch(3))
    assert load_checkpoint(saved).optimizer.keys() == straight._ready_core.trainer_state().optimizer.keys()
    assert all(".lora_" in name for name in load_checkpoint(saved).optimizer)

    resumed = actor(tmp_path, settings, checkpoint=saved)
    resumed.step(batch(3))
    assert_same(straight._ready_core, resumed._ready_core)

    merged = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), saved / "adapter")
    assert not torch.equal(logits_of(merged), logits_of(with_biases()))
    # In bfloat16 the merged weights are rounded, as the engines have them.
    bound = 1e-5 if autocast == "float32" else 0.05
    assert float((logits_of(by_peft) - logits_of(merged)).abs().mean()) < bound


def test_other_adapters_are_not_gone_on_with(tmp_path: Path) -> None:
    saved = actor(tmp_path, SETTINGS).save(tmp_path / "checkpoints")
    spec = learner_spec(tmp_path, settings=SETTINGS, adapters=AdapterSettings(rank=8, alpha=6), checkpoint=saved)
    with pytest.raises(ValueError, match=r"adapter .* has shape \(4, \d+\), not \(8, \d+\)"):
        LearnerActor(spec, share=Share(threads=1)).ready()


def test_adapters_do_not_go_on_beside_another_model(tmp_path: Path) -> None:
    first = actor(tmp_path, SETTINGS)
    saved = first.save(tmp_path / "checkpoints")
    full = core(tmp_path, settings=SETTINGS)
    full.step(batch(1))
    save_model(full.model, tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match=r"is not the model beside which .*step-000000 were trained: .*norm"):
        actor(tmp_path, SETTINGS, checkpoint=saved)
    merged = core(tmp_path, settings=SETTINGS, model=adapted(trained=True))
    save_model(merged_of(merged), tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match=r"is not the model beside which .*step-000000 were trained: .*proj"):
        actor(tmp_path, SETTINGS, checkpoint=saved)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no linear layers .* learner\.lora = 0"):
        add_adapters(model, ADAPTERS)
