"""The learner on a GPU computes what it computes on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_builders import POOL, random_groups, solved_group, step_batch, tiny_model, tokenizer
from plain_settings import correction_settings, learner_settings, loss_settings, optimizer_settings, probe_settings
from torch import Tensor

from rexrag.learner.checkpoint import load_checkpoint, save_checkpoint
from rexrag.learner.step import LearnerCore, LearnerSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SETTINGS = learner_settings(
    optimizer=optimizer_settings(learning_rate=1e-3), loss=loss_settings(preserve=1.0), micro_batch_tokens=64
)
EXACT = replace(
    SETTINGS,
    probe=probe_settings(filter="none"),
    correction=correction_settings(mixture="sequence"),
    loss=loss_settings(train_prefix=True),
)


def trained(settings: LearnerSettings, *, device: str, folder: Path, num_steps: int) -> LearnerCore:
    model = tiny_model().to(torch.device(device))  # type: ignore[arg-type]
    learner = LearnerCore(model, settings=settings, hints=POOL, evidence_folder=folder)
    for step in range(1, num_steps + 1):
        version = learner.num_steps
        groups = [*random_groups(seed=step, version=version), solved_group(step, version=version)]
        learner.step(step_batch(groups, step=step))
    return learner


def weights_after(num_steps: int, settings: LearnerSettings, *, device: str, folder: Path) -> Tensor:
    """All weights in one vector, float64 on the CPU."""
    learner = trained(settings, device=device, folder=folder, num_steps=num_steps)
    return torch.cat([p.detach().double().cpu().flatten() for p in learner.model.parameters()])


def similarity(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("settings", [SETTINGS, EXACT], ids=["preserving", "exact"])
def test_steps_are_those_of_the_cpu(settings: LearnerSettings, tmp_path: Path) -> None:
    before = weights_after(0, settings, device="cpu", folder=tmp_path)
    theirs = weights_after(3, settings, device="cpu", folder=tmp_path) - before
    ours = weights_after(3, settings, device="cuda", folder=tmp_path) - before
    assert similarity(ours, theirs) > 0.999  # not each weight: where a gradient is all but 0 Adam divides by rounding


def test_a_step_in_bfloat16_goes_the_same_way(tmp_path: Path) -> None:
    wide = replace(SETTINGS, optimizer=optimizer_settings(learning_rate=1e-3, beta1=0.0))
    before = weights_after(0, wide, device="cpu", folder=tmp_path)
    theirs = weights_after(1, wide, device="cpu", folder=tmp_path) - before
    ours = weights_after(1, replace(wide, autocast="bfloat16"), device="cuda", folder=tmp_path) - before
    assert similarity(ours, theirs) > 0.9


def test_a_checkpoint_goes_from_gpu_to_cpu(tmp_path: Path) -> None:
    learner = trained(SETTINGS, device="cuda", folder=tmp_path, num_steps=3)
    state = learner.trainer_state()
    folder = save_checkpoint(tmp_path / "checkpoints", model=learner.model, tokenizer=tokenizer(), trainer_state=state)
    other = trained(SETTINGS, device="cpu", folder=tmp_path, num_steps=0)
    other.load_trainer_state(load_checkpoint(folder))
    loaded = other.trainer_state().optimizer
    assert loaded.keys() == state.optimizer.keys()
    assert all(torch.equal(tensor.cpu(), loaded[name]) for name, tensor in state.optimizer.items())
