from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_builders import core, learner_spec, random_groups, solved_group, step_batch, tiny_model, tokenizer
from plain_settings import correction_settings, learner_settings, loss_settings, optimizer_settings, probe_settings
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rexrag.errors import RunFailure, RunFolderError
from rexrag.learner.checkpoint import COMMIT, list_checkpoints, load_checkpoint, prune, save_checkpoint
from rexrag.learner.learner_actor import LearnerActor
from rexrag.learner.probe_filter import INITIAL_SUCCESS
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.weight_proof import bit_sum
from rexrag.processes import Share

SETTINGS = learner_settings(optimizer=optimizer_settings(learning_rate=1e-3, warmup_steps=3, weight_decay=0.01))


def train(learner: LearnerCore, *, to: int) -> None:
    while learner.num_steps < to:
        step = learner.num_steps + 1
        groups = random_groups(seed=step, version=learner.num_steps)
        learner.step(step_batch([*groups, solved_group(step, version=learner.num_steps)], step=step))


def save(learner: LearnerCore, folder: Path) -> Path:
    return save_checkpoint(folder, model=learner.model, tokenizer=tokenizer(), trainer_state=learner.trainer_state())


def load_model(folder: Path) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


EXACT = replace(
    SETTINGS,
    probe=probe_settings(filter="none"),
    correction=correction_settings(mixture="sequence"),
    loss=loss_settings(train_prefix=True, preserve=1.0),
)


@pytest.mark.parametrize("settings", [SETTINGS, EXACT], ids=["token", "sequence"])
def test_two_and_two_steps_are_four_bit_for_bit(tmp_path: Path, settings: LearnerSettings) -> None:
    straight = core(tmp_path, settings=settings)
    train(straight, to=4)

    first = core(tmp_path, settings=settings)
    train(first, to=2)
    folder = save(first, tmp_path / "checkpoints")
    saved = load_checkpoint(folder)
    resumed = core(tmp_path, settings=settings, model=load_model(folder))
    resumed.load_trainer_state(saved)
    assert saved.success != INITIAL_SUCCESS
    train(resumed, to=4)

    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = straight.trainer_state(), resumed.trainer_state()
    assert (ours.step, ours.num_updates, ours.success) == (theirs.step, theirs.num_updates, theirs.success)
    assert (ours.step, ours.num_updates) == (4, 4)
    assert (ours.mean_tokens, ours.branch_counts) == (theirs.mean_tokens, theirs.branch_counts)
    assert (ours.mean_tokens is not None) == (settings is EXACT)
    assert ours.num_solved == theirs.num_solved == (4 if settings is EXACT else 0)
    assert all(torch.equal(ours.preserved[key], theirs.preserved[key]) for key in ours.preserved)
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert all(torch.equal(ours.optimizer[key], theirs.optimizer[key]) for key in ours.optimizer)


def test_the_generators_state_is_restored(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=SETTINGS)
    torch.manual_seed(5)
    saved = load_checkpoint(save(learner, tmp_path / "checkpoints"))
    expected = torch.rand(3)
    learner.load_trainer_state(saved)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_is_a_model_folder_of_one_file(tmp_path: Path) -> None:
    folder = save(core(tmp_path, settings=SETTINGS), tmp_path / "checkpoints")
    assert folder.name == "step-000000"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "trainer/optimizer.safetensors", COMMIT} <= names
    assert set(json.loads((folder / COMMIT).read_text())["files"]) == names - {COMMIT}
    assert "rexrag" not in (folder / "config.json").read_text()
    ids = torch.arange(8)[None]
    assert torch.equal(load_model(folder)(ids).logits, tiny_model()(ids).logits)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    folder = save(core(tmp_path, settings=SETTINGS), tmp_path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(RunFolderError, match=r"model\.safetensors is missing or is not the file that was saved"):
        load_checkpoint(folder)


def test_only_committed_folders_count(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=SETTINGS)
    assert list_checkpoints(tmp_path / "none") == []
    folder = save(learner, tmp_path)
    (folder / COMMIT).unlink()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(RunFolderError, match="no COMMIT file"):
        load_checkpoint(folder)
    (tmp_path / "step-000000.tmp").mkdir()
    again = save(learner, tmp_path)
    assert list_checkpoints(tmp_path) == [again]
    assert load_checkpoint(again).step == 0
    assert not (tmp_path / "step-000000.tmp").exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=SETTINGS)
    saved = []
    for _ in range(5):
        saved.append(save(learner, tmp_path))
        learner.num_steps += 1
    (tmp_path / "step-000002.tmp").mkdir()
    half_deleted = tmp_path / "step-000001"
    assert prune(tmp_path, keep_last=2, needed=[saved[0]]) == [saved[1], saved[2]]
    assert list_checkpoints(tmp_path) == [saved[0], saved[3], saved[4]]
    assert not half_deleted.exists()
    assert not (tmp_path / "step-000002.tmp").exists()
    assert prune(tmp_path, keep_last=2, needed=[saved[0]]) == []
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune(tmp_path, keep_last=0, needed=())


def test_an_old_checkpoint_that_cannot_be_deleted_yet_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner = core(tmp_path, settings=SETTINGS)
    saved = []
    for _ in range(2):
        saved.append(save(learner, tmp_path))
        learner.num_steps += 1

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        assert prune(tmp_path, keep_last=1, needed=()) == saved[:1]
    assert "cannot be deleted yet" in caplog.text
    assert list_checkpoints(tmp_path) == saved[1:]
    assert prune(tmp_path, keep_last=1, needed=()) == []
    assert not saved[0].exists()


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    learner = core(tmp_path, settings=SETTINGS)
    train(learner, to=1)
    state = learner.trainer_state()
    with pytest.raises(ValueError, match="is no moment of a parameter"):
        learner._optimizer.load_state({"exp_avg/other": torch.zeros(1)}, num_updates=1)
    name = next(key for key in state.optimizer if key.startswith("exp_avg/"))
    with pytest.raises(ValueError, match="has shape"):
        learner._optimizer.load_state({name: torch.zeros(1)}, num_updates=1)


def exported(actor: LearnerActor) -> tuple[list[Any], Any]:
    """The buckets, and their proof."""
    *buckets, proof = actor.export("float32")
    return buckets, proof


def test_the_shell_trains_saves_and_goes_on(tmp_path: Path) -> None:
    spec = learner_spec(tmp_path, settings=SETTINGS, bucket_bytes=20_000)
    actor = LearnerActor(spec, share=Share(threads=1))
    loaded = actor.ready()
    assert actor.step(step_batch(random_groups())).updated
    folder = actor.save(tmp_path / "checkpoints")
    other = LearnerActor(replace(spec, checkpoint=folder), share=Share(threads=1))
    other.ready()
    assert other.rho() == actor.rho()
    (ours, proof), (theirs, their_proof) = exported(actor), exported(other)
    assert len(ours) == len(theirs) == loaded.num_buckets > 2
    assert bit_sum([array for bucket in ours for array in bucket.values()]) == proof.bits == their_proof.bits
    assert {name for bucket in ours for name in bucket} == actor._ready_core.weight_sizes.keys()
    for mine, other_bucket in zip(ours, theirs, strict=True):
        assert all((mine[name] == other_bucket[name]).all() for name in mine)


@pytest.mark.parametrize("num_bytes", [200, 20_000])
def test_a_full_disk_is_told_with_the_path_and_leaves_no_half_checkpoint(tmp_path: Path, num_bytes: int) -> None:
    """Files may not grow beyond a limit; the model's is the first of them, or the tokenizer's."""
    learner = core(tmp_path, settings=SETTINGS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        with pytest.raises(RunFailure, match=r"checkpoint .*step-000000 cannot be written: .*; free space and resume"):
            save(learner, tmp_path / "checkpoints")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (save(learner, tmp_path / "checkpoints") / COMMIT).is_file()
