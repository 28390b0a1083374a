from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_builders import (
    POOL,
    core,
    first_gradient,
    group,
    random_groups,
    recorded_by,
    step_batch,
    target,
    tiny_model,
)
from plain_settings import correction_settings, learner_settings, loss_settings, optimizer_settings, probe_settings
from torch import Tensor

import rexrag.metrics as keys
from rexrag.errors import RunFailure, StaleGroupError
from rexrag.learner.advantage import group_advantages
from rexrag.learner.branches import BranchRates
from rexrag.learner.mixture_weights import MixtureWeigher
from rexrag.learner.sequence_weights import sequence_log_weights
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model import logprobs
from rexrag.types import Kind, StepResult, TrajectoryGroup

UNCLIPPED = optimizer_settings(learning_rate=1e-3, max_grad_norm=1e9)


def settings(**fields: object) -> LearnerSettings:
    return replace(learner_settings(optimizer=UNCLIPPED, probe=probe_settings(filter="none")), **fields)  # type: ignore[arg-type]


def parameters(learner: LearnerCore) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradient_by_hand(groups: Sequence[TrajectoryGroup], *, alpha: float, kl_coef: float = 0.0) -> dict[str, Tensor]:
    """§5 to §7 with one ordinary forward pass per row and no code of packing, objective or step."""
    model, reference = tiny_model(), tiny_model(seed=9)
    total = torch.zeros(())
    count = 0
    weigher = MixtureWeigher(
        correction=correction_settings(), probe=probe_settings(), hints=POOL, num_probes=0, num_targets=1
    )
    weigher.alpha = alpha
    for one in groups:
        rows = one.trajectories
        advantages = group_advantages(
            np.array([row.reward for row in rows]),
            is_probe=np.array([row.kind is Kind.PROBE for row in rows]),
            family=list(range(len(rows))),
            baseline="joint",
        )
        for row, advantage in zip(rows, advantages, strict=True):
            tokens = weigher.tokens_of(row, loss_settings())
            at = tokens.trained
            count += len(at)
            ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
            logprob = model(ids).logits[0].log_softmax(-1)[at - 1, row.token_ids[at]]
            w = weigher.weights(row, tokens)
            stale = (logprob.detach() - torch.from_numpy(row.behavior_logprob[at])).exp().clamp(max=2.0)
            total = total - (torch.from_numpy(w) * stale * float(advantage) * logprob).sum()
            if kl_coef:
                with torch.no_grad():
                    ref = reference(ids).logits[0].log_softmax(-1)[at - 1, row.token_ids[at]]
                is_policy = torch.from_numpy(row.origin[at] == 1)
                total = total + kl_coef * ((ref - logprob).exp() - 1 - (ref - logprob))[is_policy].sum()
    (total / count).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradient(learner: LearnerCore, wanted: dict[str, Tensor]) -> None:
    got = first_gradient(learner)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("micro_batch_tokens", [16, 50, 4096])
def test_gradient_is_that_of_the_formulas_however_the_batch_is_cut(tmp_path: Path, micro_batch_tokens: int) -> None:
    groups = random_groups()
    learner = core(tmp_path, settings=settings(micro_batch_tokens=micro_batch_tokens))
    result = learner.step(step_batch(groups))
    assert_gradient(learner, gradient_by_hand(groups, alpha=3 / 12))
    assert result.metrics[keys.MIXTURE_ALPHA] == pytest.approx(0.25)
    assert (result.metrics[keys.LEARNER_MICRO_BATCHES] == 1) == (micro_batch_tokens == 4096)


ESTIMATORS = {
    "sequence": settings(correction=correction_settings(mixture="sequence"), loss=loss_settings(train_prefix=True)),
    "normalized": settings(correction=correction_settings(mixture="normalized"), loss=loss_settings(train_prefix=True)),
    "hint-free": settings(probe=probe_settings(transfer="hint_free", filter="none")),
    "exact hint-free": settings(
        probe=probe_settings(transfer="hint_free", filter="none"),
        correction=correction_settings(mixture="sequence"),
        loss=loss_settings(train_prefix=True),
    ),
    "normalized hint-free": settings(
        probe=probe_settings(transfer="hint_free", filter="none"),
        correction=correction_settings(mixture="normalized"),
        loss=loss_settings(train_prefix=True),
    ),
    "preserving": settings(loss=loss_settings(preserve=2.0)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimators_gradient_is_the_same_however_the_batch_is_cut(tmp_path: Path, name: str) -> None:
    groups = [scored(one) for one in random_groups()]
    likely = replace(target(1.0), behavior_logprob=np.array([0, 0, 0, -0.01, -0.01, -0.01], np.float32))
    gradients = []
    for micro_batch_tokens in (4096, 16, 45):
        learner = core(tmp_path, settings=replace(ESTIMATORS[name], micro_batch_tokens=micro_batch_tokens))
        learner._preserving.add([group(likely, likely, name=f"right-{i}") for i in range(3)])
        learner.step(step_batch(groups))
        gradients.append(first_gradient(learner))
    assert all(float(gradient.norm()) > 0 for gradient in gradients[0].values())
    for other in gradients[1:]:
        for key, gradient in gradients[0].items():
            assert float((other[key] - gradient).norm() / gradient.norm()) < 1e-5, key


def scored(one: TrajectoryGroup) -> TrajectoryGroup:
    """The group with what hint-free transfer records: targets draw their first branch position and hint 0."""
    rows = []
    for row in one.trajectories:
        fields: dict[str, object] = {"score_version": 0}
        if row.kind is Kind.TARGET:
            fields |= {"alternative_branch": 0, "alternative_hint_id": 0}
        scores = np.where(row.has_density, row.behavior_logprob - 0.25, 0.0).astype(np.float32)
        rows.append(replace(row, alternative_logprob=scores, **fields))  # type: ignore[arg-type]
    return replace(one, trajectories=tuple(rows))


def test_a_rows_staleness_weight_is_the_product_over_its_tokens(tmp_path: Path) -> None:
    """With whole-trajectory weights: by an ordinary pass per row, no code of packing, objective or step."""
    groups = random_groups()
    learner = core(tmp_path, settings=ESTIMATORS["sequence"])
    learner.step(step_batch(groups))
    rates = BranchRates()
    rows = [row for one in groups for row in one.trajectories]
    rates.observe([row for row in rows if row.kind is Kind.TARGET], branch="answer")
    mixture = sequence_log_weights(
        rows, probe_rate=0.5, hints=POOL, branch="answer", transfer="hinted", rates=rates
    ).exp()
    model = tiny_model()
    total, num_tokens = torch.zeros(()), 0
    for one, first in zip(groups, range(0, len(rows), 4), strict=True):
        advantages = group_advantages(
            np.array([row.reward for row in one.trajectories]),
            is_probe=np.array([row.kind is Kind.PROBE for row in one.trajectories]),
            family=list(range(4)),
            baseline="joint",
        )
        for i, (row, advantage) in enumerate(zip(one.trajectories, advantages, strict=True)):
            at = np.flatnonzero(row.has_density)
            num_tokens += len(at)
            ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
            logprob = model(ids).logits[0].log_softmax(-1)[at - 1, row.token_ids[at]]
            ratio = (logprob.detach() - torch.from_numpy(row.behavior_logprob[at])).sum().exp().clamp(max=2.0)
            total = total - mixture[first + i].float() * ratio * float(advantage) * logprob.sum()
    # N: 1.5 rows per target, of the mean length of this first step's rows.
    (total / (1.5 * 9 * num_tokens / len(rows))).backward()  # type: ignore[no-untyped-call]
    assert_gradient(learner, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("micro_batch_tokens", [20, 4096])
def test_kl_is_over_the_policy_tokens_of_all_rows(tmp_path: Path, micro_batch_tokens: int) -> None:
    flat = group(target(1.0, branch_point=1), target(1.0, ids=(13, 14), branch_point=1), name="flat")
    groups = [*random_groups(2), flat]
    config = settings(micro_batch_tokens=micro_batch_tokens, loss=loss_settings(kl_coef=0.1))
    learner = core(tmp_path, settings=config, reference=tiny_model(seed=9))
    result = learner.step(step_batch(groups))
    assert_gradient(learner, gradient_by_hand(groups, alpha=2 / 10, kl_coef=0.1))
    kl = result.metrics[keys.POLICY_KL_REF]
    assert kl is not None
    assert kl > 0
    assert result.metrics[keys.TRAINED_ROWS] == 10


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    groups = random_groups()
    learner = core(tmp_path, settings=settings(gradient_checkpointing=True))
    learner.step(step_batch(groups))
    assert_gradient(learner, gradient_by_hand(groups, alpha=3 / 12))


def test_bfloat16_autocast_gives_the_gradient_within_its_precision(tmp_path: Path) -> None:
    groups = random_groups()
    learner = core(tmp_path, settings=settings(autocast="bfloat16"))
    learner.step(step_batch(groups))
    wanted = gradient_by_hand(groups, alpha=3 / 12)
    for name, gradient in first_gradient(learner).items():
        assert gradient.dtype is torch.float32
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 0.05, name


def test_rows_that_begin_alike_meet_in_one_micro_batch_though_others_came_between(tmp_path: Path) -> None:
    beginnings = (range(10, 18), range(20, 28))
    rows = [target(float(last == 30), ids=(*first, last, 9)) for last in (30, 31) for first in beginnings]
    result = core(tmp_path, settings=settings(micro_batch_tokens=13)).step(step_batch([group(*rows)]))
    assert result.metrics[keys.LEARNER_MICRO_BATCHES] == 2
    assert result.metrics[keys.LEARNER_SHARED_SHARE] == pytest.approx(2 * 11 / (4 * 12))


def test_on_policy_without_probes_every_weight_is_exactly_one(tmp_path: Path) -> None:
    model = tiny_model()
    only_targets = [replace(one, trajectories=one.trajectories[:3]) for one in random_groups()]
    groups = recorded_by(model, only_targets)
    result = core(tmp_path, settings=settings(), model=model).step(step_batch(groups))
    assert set(result.histograms[keys.HISTOGRAM_WEIGHT]) == {1.0}
    assert result.metrics[keys.WEIGHT_ESS_TARGET] == 1.0
    assert result.metrics[keys.POLICY_MISMATCH_KL] == 0.0
    assert result.metrics[keys.MIXTURE_ALPHA] == 0.0


def test_recorded_log_probs_agree_across_packings(tmp_path: Path) -> None:
    one, other = recorded_by(tiny_model(), random_groups()), recorded_by(tiny_model(), random_groups(), budget=20)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a.trajectories, b.trajectories, strict=True):
            assert np.allclose(x.behavior_logprob, y.behavior_logprob, atol=2e-6)


def test_bounds_reach_the_gradient(tmp_path: Path) -> None:
    groups = recorded_by(tiny_model(), random_groups())
    shifted = [shift_logprobs(one, by=-1.0) for one in groups]  # w_stale = e on every token
    free = first_step(tmp_path, shifted, bound="none")
    cut = first_step(tmp_path, shifted, bound="truncate")
    masked = first_step(tmp_path, shifted, bound="mask")
    name = "model.norm.weight"
    assert torch.allclose(
        first_gradient(free[0])[name], first_gradient(cut[0])[name] * math.e / 2, rtol=1e-4, atol=1e-8
    )
    assert cut[1].metrics[keys.WEIGHT_TRUNCATED_SHARE] == 1.0
    assert masked[1].metrics[keys.WEIGHT_MASKED_SHARE] == 1.0
    assert not first_gradient(masked[0])[name].any()


def first_step(
    folder: Path, groups: Sequence[TrajectoryGroup], *, bound: Literal["truncate", "mask", "none"]
) -> tuple[LearnerCore, StepResult]:
    learner = core(folder, settings=settings(correction=correction_settings(mixture="none", bound=bound)))
    return learner, learner.step(step_batch(groups))


def shift_logprobs(one: TrajectoryGroup, *, by: float) -> TrajectoryGroup:
    rows = tuple(
        replace(row, behavior_logprob=np.where(row.has_density, row.behavior_logprob + np.float32(by), np.float32(0)))
        for row in one.trajectories
    )
    return replace(one, trajectories=rows)


def test_step_without_advantage_leaves_all_but_the_counter(tmp_path: Path) -> None:
    decaying = optimizer_settings(learning_rate=1e-2, weight_decay=0.1, warmup_steps=4)
    learner = core(tmp_path, settings=settings(optimizer=decaying))
    before = parameters(learner)
    result = learner.step(step_batch([group(target(1.0), target(1.0)), group(target(0.0), target(0.0), name="b")]))
    assert same(before, parameters(learner))
    assert (result.applied, result.updated, learner.num_steps) == (True, False, 1)
    assert learner.trainer_state().num_updates == 0
    assert result.metrics[keys.TRAINED_ROWS] == 0
    assert result.metrics[keys.GRAD_NORM] is None
    assert result.metrics[keys.WEIGHT_MEAN] is None
    after = learner.step(step_batch(random_groups(), step=2))
    assert after.updated
    assert after.metrics[keys.LEARNING_RATE] == pytest.approx(1e-2 / 4)


def test_warm_up_counts_updates(tmp_path: Path) -> None:
    config = settings(optimizer=optimizer_settings(learning_rate=1e-3, warmup_steps=2))
    learner = core(tmp_path, settings=config)
    rates = [learner.step(step_batch(random_groups(), step=s)).metrics[keys.LEARNING_RATE] for s in (1, 2, 3)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_decay_falls_to_a_tenth_after_the_warm_up(tmp_path: Path) -> None:
    config = settings(optimizer=optimizer_settings(learning_rate=1e-3, warmup_steps=1, decay_steps=3))
    learner = core(tmp_path, settings=config)
    rates = []
    for step in range(1, 6):
        groups = random_groups(version=learner.num_steps)
        rates.append(learner.step(step_batch(groups, step=step)).metrics[keys.LEARNING_RATE])
    assert rates == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4, 1e-4])


def test_training_makes_good_rows_likelier(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(optimizer=optimizer_settings(learning_rate=3e-3)))
    seen = [learner.step(step_batch(random_groups(), step=s)).metrics[keys.POLICY_CORRECT_LOGPROB] for s in range(1, 3)]
    for _ in range(8):
        again = random_groups(version=learner.num_steps)
        seen.append(learner.step(step_batch(again, step=learner.num_steps + 1)).metrics[keys.POLICY_CORRECT_LOGPROB])
    assert seen[0] is not None
    assert seen[-1] is not None
    assert seen[-1] > seen[0] + 0.1


def test_rate_of_the_filter_follows_the_steps_before(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(probe=probe_settings()))
    assert learner.rho == 0.18
    wrong = [shift_rewards(one) for one in random_groups()]
    first = learner.step(step_batch(wrong))
    assert first.metrics[keys.FILTER_RHO] == 0.18
    assert learner.rho == pytest.approx(0.162)
    second = learner.step(step_batch(wrong, step=2))
    assert second.metrics[keys.FILTER_RHO] == pytest.approx(0.162)
    assert second.metrics[keys.FILTER_SUCCESS] == pytest.approx(0.1458)
    # 9 targets: ⌊0.18 · 9⌋ = ⌊0.162 · 9⌋ = 1 probe is kept.
    assert second.metrics[keys.FILTER_KEPT] == 1


def shift_rewards(one: TrajectoryGroup) -> TrajectoryGroup:
    rows = [replace(row, correct=False, em=0.0) if row.kind is Kind.PROBE else row for row in one.trajectories]
    return replace(one, trajectories=tuple(rows))


def test_non_finite_steps_are_skipped_then_end_the_run(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(max_bad_steps=2))
    with torch.no_grad():
        learner.model.model.norm.weight[0] = math.nan
    before = parameters(learner)
    result = learner.step(step_batch(random_groups()))
    assert (result.applied, result.updated, learner.num_steps) == (False, False, 1)
    assert result.metrics[keys.BAD_STEPS] == 1
    assert result.metrics[keys.GRAD_NORM] is None
    assert all(
        torch.equal(p.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, p in learner.model.named_parameters()
    )
    with pytest.raises(RunFailure, match=r"not finite in 2 consecutive steps up to step 2") as failure:
        learner.step(step_batch(random_groups(), step=2))
    path = tmp_path / "evidence" / "bad-step-000002.arrow"
    assert str(path) in str(failure.value)
    with pa.ipc.open_stream(str(path)) as reader:
        assert b"rexrag.evidence" in (reader.schema.metadata or {})
        assert len(list(reader)) == 3


def test_evidence_that_cannot_be_kept_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_text("a file where the folder would be")
    learner = core(tmp_path, settings=settings(max_bad_steps=1))
    with torch.no_grad():
        learner.model.model.norm.weight[0] = math.nan
    with pytest.raises(RunFailure, match=r"not finite in 1 consecutive step .*the last batch could not be kept \("):
        learner.step(step_batch(random_groups()))


def test_a_row_that_is_not_finite_further_on_skips_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one weight for a row its first chunk already knows the last."""
    monkeypatch.setitem(logprobs.CHUNK_TOKENS, "cpu", 2)
    correction = correction_settings(mixture="sequence")
    learner = core(tmp_path, settings=settings(correction=correction, loss=loss_settings(train_prefix=True)))

    def break_from(module: torch.nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        return torch.where(inputs[0][..., None] == broken, math.nan, embedded)

    row = random_groups()[0].trajectories[0]
    broken = int(row.token_ids[-2])
    assert broken not in row.token_ids[:-2], "all that comes before it is finite"
    learner.model.model.embed_tokens.register_forward_hook(break_from)
    assert not learner.step(step_batch(random_groups())).applied


def test_full_gpu_memory_names_the_setting_that_helps(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(micro_batch_tokens=48))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    learner.model.model.register_forward_pre_hook(full)
    with pytest.raises(RunFailure, match=r"step 1 .* learner\.micro_batch_tokens = 48: .*CUDA out of memory"):
        learner.step(step_batch(random_groups()))
    assert learner.num_steps == 0


def test_a_good_step_resets_the_count_of_bad_ones(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(max_bad_steps=2))
    norm = learner.model.model.norm.weight
    for step, is_bad in enumerate([True, False, True], start=1):
        kept = float(norm[0].detach())
        with torch.no_grad():
            norm[0] = math.inf if is_bad else kept
        result = learner.step(step_batch(random_groups(), step=step))
        assert result.applied is not is_bad
        with torch.no_grad():
            norm[0] = kept


def test_staleness_is_asserted_when_consumed(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings(max_staleness=0))
    learner.step(step_batch(random_groups()))
    with pytest.raises(StaleGroupError, match=r"exceeds replay\.max_staleness 0"):
        learner.step(step_batch(random_groups(), step=2))


def test_a_batch_of_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch is of step 3, the learner is at step 1"):
        core(tmp_path, settings=settings()).step(step_batch(random_groups(), step=3))


def test_kl_needs_a_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kl_coef is 0.1"):
        core(tmp_path, settings=settings(loss=loss_settings(kl_coef=0.1)))


def test_exported_weights(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=settings())
    weights = learner.export_weights(learner.weight_sizes, dtype="float32")
    assert set(weights) == {name for name, _ in learner.model.named_parameters()}
    assert "lm_head.weight" not in weights
    name = "model.embed_tokens.weight"
    assert weights[name].dtype == np.float32
    assert np.shares_memory(weights[name], learner.model.get_parameter(name).detach().numpy())
    bits = learner.export_weights([name], dtype="bfloat16")[name]
    assert bits.dtype == np.uint16
    back = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(back, learner.model.get_parameter(name).detach().bfloat16())


def test_metrics_are_finite_documented_and_complete(tmp_path: Path) -> None:
    result = core(tmp_path, settings=settings(probe=probe_settings())).step(step_batch(random_groups()))
    by_controller = {
        keys.ENGINE_CANARY_KL,
        keys.ENGINE_UNPROVEN,
        keys.ENGINE_SWITCH_S,
        keys.ENGINE_PROOF_S,
        keys.TIME_LEARNER_WAIT,
        keys.ROLLOUT_TOKENS_PER_S,
        keys.ROLLOUT_ACTORS,
        keys.ROLLOUT_ACTORS_WANTED,
        keys.ROLLOUT_REPLACED,
        keys.SEARCH_EMPTY,
        keys.SEARCH_FAILED,
        keys.SEARCH_RETRIED,
        keys.SEARCH_OUTAGES,
        keys.SEARCH_OUTAGE_S,
    }
    histograms = {key for key in keys.DESCRIPTIONS if key.startswith("histogram/")}
    warnings = {key for key in keys.DESCRIPTIONS if key.startswith("warning/")}
    assert set(map(keys.described, result.metrics)) == set(keys.DESCRIPTIONS) - by_controller - histograms - warnings
    assert set(result.histograms) == histograms
    assert all(value is None or math.isfinite(value) for value in result.metrics.values())
