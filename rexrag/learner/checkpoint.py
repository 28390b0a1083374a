"""Checkpoints: a transformers model folder, the trainer's state, and a manifest that says the folder is whole.

    step-000020/
        model.safetensors, config.json, tokenizer files       loadable by transformers as they are
        adapter/                                              where adapters are trained: they, in PEFT's format
        trainer/optimizer.safetensors, trainer/state.json     all that resuming bit for bit needs beside the weights
        COMMIT                                                size and SHA-256 of every other file, written last

A folder without `COMMIT` does not exist for any reader. Files hold safetensors and JSON only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rexrag.errors import RunFailure, RunFolderError
from rexrag.files import sha256_file, sync_folder, write_atomic
from rexrag.learner.trainer_state import TrainerState
from rexrag.model.adapters import load_adapters, save_adapters

LOG = logging.getLogger(__name__)

COMMIT: Final = "COMMIT"
_OPTIMIZER: Final = "trainer/optimizer.safetensors"
_STATE: Final = "trainer/state.json"
_ADAPTER: Final = "adapter"
_RNG: Final = "rng"
_OPTIMIZER_PREFIX: Final = "optimizer/"
_PRESERVED_PREFIX: Final = "preserved/"
_NAME: Final = re.compile(r"step-(\d{6,})")
_TEMPORARY: Final = re.compile(r"step-\d{6,}\.tmp")
# One file whatever the size: readers may rely on `model.safetensors`.
_MAX_SHARD: Final = "100000GB"


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint folder after `step` learner steps."""
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: TrainerState,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-NNNNNN durably and return it.

    It is built in step-NNNNNN.tmp, renamed when every file is on disk, and counts once COMMIT is in it. Leftovers of
    a crashed attempt at the same step are replaced; a committed checkpoint of the step is left alone.

    Args:
        weights: of the model by name, where it is in shards or has adapters; None: its own.

    Raises:
        RunFailure: the disk is full or broken; nothing of the attempt is left, and older checkpoints are as they were.
    """
    final = folder / checkpoint_name(trainer_state.step)
    if (final / COMMIT).is_file():
        return final
    temporary = final.with_name(final.name + ".tmp")
    leftovers = (final, temporary)
    try:
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        return _build(final, temporary, model=model, tokenizer=tokenizer, trainer_state=trainer_state, weights=weights)
    except (OSError, SafetensorError) as error:
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunFailure(f"checkpoint {final} cannot be written: {reason}; free space and resume") from error


def _build(
    final: Path,
    temporary: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trainer_state: TrainerState,
    weights: Mapping[str, Tensor] | None,
) -> Path:
    (temporary / "trainer").mkdir(parents=True)
    model.save_pretrained(temporary, max_shard_size=_MAX_SHARD, state_dict=weights)  # type: ignore[arg-type]
    tokenizer.save_pretrained(temporary)
    if trainer_state.adapters:
        save_adapters(temporary / _ADAPTER, model=model, tensors=trainer_state.adapters)
    _save_trainer(temporary, trainer_state)
    manifest = {}
    for path in _files(temporary):
        _sync_file(path)
        name = path.relative_to(temporary).as_posix()
        manifest[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    for inside in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
        sync_folder(inside)
    temporary.rename(final)
    sync_folder(final.parent)
    write_atomic(final / COMMIT, json.dumps({"step": trainer_state.step, "files": manifest}, indent=1) + "\n")
    return final


def load_checkpoint(folder: Path, *, verify: bool = True) -> TrainerState:
    """Verify a checkpoint's files against its manifest and read the trainer's state; the model is loaded apart.

    Args:
        verify: false where another process does.

    Raises:
        RunFolderError: it is not committed, or a file is missing, damaged, or of another format.
    """
    if verify:
        _verify(folder)
    try:
        state = json.loads((folder / _STATE).read_text())
        tensors = load_file(folder / _OPTIMIZER)
        return TrainerState(
            step=state["step"],
            num_updates=state["num_updates"],
            success=state["success"],
            bad_steps=state["bad_steps"],
            num_solved=state["num_solved"],
            mean_tokens=state["mean_tokens"],
            branch_counts=[(turn, token, seen, forked) for turn, token, seen, forked in state["branch_counts"]],
            optimizer=_part(tensors, _OPTIMIZER_PREFIX),
            adapters=load_adapters(folder / _ADAPTER),
            preserved=_part(tensors, _PRESERVED_PREFIX),
            rng=tensors[_RNG],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunFolderError(f"checkpoint {folder} has another format ({error!r}): resume from another one") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a folder, oldest first; none where the folder is missing."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / COMMIT).is_file()]


def prune(folder: Path, *, keep_last: int, needed: Collection[Path]) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those `needed`, and what crashed attempts left behind.

    COMMIT goes first, so that a half deleted folder is no checkpoint. Returns the deleted checkpoints.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, it must be at least 1")
    committed = list_checkpoints(folder)
    here = folder.resolve()
    kept = {path.name for path in committed[-keep_last:]} | {
        path.name for path in needed if path.parent.resolve() == here
    }
    deleted = [path for path in committed if path.name not in kept]
    for path in deleted:
        uncommit(path)
    newest = committed[-1].name if committed else ""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        is_leftover = _NAME.fullmatch(path.name) and not (path / COMMIT).exists() and path.name < newest
        if is_leftover or _TEMPORARY.fullmatch(path.name):
            delete_rest(path)
    return deleted


def delete_rest(folder: Path) -> None:
    """Delete a checkpoint that counts no more. Where somebody still reads it, or has deleted it, a later call does."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        LOG.warning("what is left of an old checkpoint cannot be deleted yet: %s", error)


def uncommit(folder: Path) -> None:
    """Let a checkpoint count no more, durably, before what is in it is deleted."""
    (folder / COMMIT).unlink(missing_ok=True)
    sync_folder(folder)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _save_trainer(folder: Path, state: TrainerState) -> None:
    parts = {_OPTIMIZER_PREFIX: state.optimizer, _PRESERVED_PREFIX: state.preserved}
    tensors = {prefix + name: t.contiguous() for prefix, part in parts.items() for name, t in part.items()}
    save_file({**tensors, _RNG: state.rng}, folder / _OPTIMIZER)
    numbers = {
        "step": state.step,
        "num_updates": state.num_updates,
        "success": state.success,
        "bad_steps": state.bad_steps,
        "num_solved": state.num_solved,
        "mean_tokens": state.mean_tokens,
        "branch_counts": list(state.branch_counts),
    }
    (folder / _STATE).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")


def _verify(folder: Path) -> None:
    commit = folder / COMMIT
    if not commit.is_file():
        raise RunFolderError(f"{folder} is no checkpoint: it has no {COMMIT} file, so it was never finished")
    try:
        files: dict[str, dict[str, object]] = json.loads(commit.read_text())["files"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunFolderError(f"{commit} is damaged ({error!r}): resume from another checkpoint") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise RunFolderError(f"{path} is missing or is not the file that was saved: resume from another checkpoint")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
