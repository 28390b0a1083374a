"""From the words of `rexrag train` to what is trained: which settings, which run folder, which checkpoint.

no run folder yet               -> new folder, step 0
--run-dir of a run              -> the same run, after its newest checkpoint
--resume CHECKPOINT, the newest -> the same run; an older one, or with a new --run-dir -> a new run after it

A job on a cluster names its run folder: its working directory is a copy that ends with the job, and a job that is
submitted again must find its run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from rexrag.config import KEYS, Config
from rexrag.errors import ConfigError, RunFolderError, UserError
from rexrag.files import write_atomic
from rexrag.recipe import (
    Recipe,
    check_runnable,
    flatten,
    load_recipe,
    make_config,
    quickstart_recipe,
    resolved_toml,
    with_prepared,
)
from rexrag.run.cluster import check_form, cluster_address
from rexrag.run.identity import check_identity, first_step_of, only_moved, origin_of, write_identity
from rexrag.run_folder import RunFolder, claim, new_run_path

LOG = logging.getLogger(__name__)

FREE: Final = (
    "guard",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.stall_timeout_s",
    "retriever.url",
    "retriever.timeout_s",
    "retriever.max_retries",
    "retriever.batch_size",
    "retriever.token_file",
    "retriever.encoder",
    "retriever.num_actors",
    "retriever.num_cpus",
    "retriever.num_gpus",
    "rollout.engine",
    "rollout.num_actors",
    "rollout.threads_per_actor",
    "rollout.episodes_per_actor",
    "rollout.num_gpus",
    "rollout.resources",
    "rollout.autoscale",
    "replay.lease_timeout_s",
    "replay.lease_deadline_s",
    "replay.segment_mb",
    "learner.threads",
    "learner.num_ranks",
    "learner.num_gpus",
    "learner.resources",
    "retriever.resources",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "learner.max_bad_steps",
)
"""Settings that a resume may change, beside [eval]: none changes what a step is meant to compute."""
ADAPTED: Final = ("model.path", "learner.lora", "learner.lora_alpha")
"""Settings that a checkpoint with adapters cannot go on without."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What the controller is asked to do, in a run folder that its caller has locked.

    Attributes:
        config: resolved settings, with what `[prepare]` makes filled in (places under `run.prepared`).
        start_step: learner steps done before this start.
        checkpoint: committed checkpoint of `start_step`; None: begin from `config.model.path`.
        resumed: whether the run has been started before, so that its files go on.
    """

    config: Config
    run: RunFolder
    start_step: int
    checkpoint: Path | None
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `rexrag train` is about to do; nothing is written before `open_run`.

    Attributes:
        root: the run folder.
        is_new: whether the folder is still to be made.
        finished: the run has done all its steps: there is nothing to do.
        unnamed: the settings without places in the run folder, where that has a default name, which another process
            may take first.
    """

    recipe: Recipe
    root: Path
    is_new: bool
    start_step: int
    checkpoint: Path | None
    finished: bool = False
    unnamed: Recipe | None = None


def plan_run(recipe: Path | None, *, overrides: Sequence[str], run_dir: Path | None, resume: str) -> Plan:
    """Decide which run is meant, and refuse what it cannot be.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint.

    Raises:
        ConfigError: settings that cannot be used, or that a resume may not change; on a cluster a run folder that
            is not named by an absolute path.
        RunFolderError: a run folder or checkpoint that does not fit the request.
    """
    check_form(cluster_address())
    _require_lasting(run_dir)
    if resume not in ("auto", "never"):
        return _plan_from_checkpoint(Path(resume), recipe=recipe, overrides=overrides, run_dir=run_dir)
    if run_dir is not None and RunFolder.is_run(run_dir):
        if resume == "never":
            raise RunFolderError(f"--resume never: run folder {run_dir} exists; name another --run-dir, or resume it.")
        return _plan_resume(RunFolder(run_dir), recipe=recipe, overrides=overrides)
    loaded = load_recipe(recipe or quickstart_recipe(), overrides=overrides)
    check_runnable(loaded)
    root = (run_dir or new_run_path(loaded.name)).resolve()
    filled = with_prepared(loaded, prepared=root / "prepared")
    unnamed = loaded if run_dir is None else None
    return Plan(recipe=filled, root=root, is_new=True, start_step=0, checkpoint=None, unnamed=unnamed)


def _require_lasting(run_dir: Path | None) -> None:
    address = cluster_address()
    if address is not None and (run_dir is None or not run_dir.is_absolute()):
        raise ConfigError(
            f"--run-dir = {run_dir or '(not given)'}: on a Ray cluster (RAY_ADDRESS = {address}) it must be an "
            "absolute path on storage that all nodes share and that outlives the job; name one, such as "
            "--run-dir /shared/runs/first, or unset RAY_ADDRESS to train on this machine alone."
        )


@contextmanager
def open_run(plan: Plan) -> Iterator[TrainRequest]:
    """Make the run folder, or bring it back to its resume point, and hold its lock for the time of the training.

    A new folder goes again where the user's mistake ends the run before anything has been made in it.

    Raises:
        RunFolderError: another process uses the folder, or did since the plan was made.
    """
    if plan.unnamed is not None:
        plan = _named(plan, plan.unnamed)
    recipe = plan.recipe
    if plan.is_new:
        text = resolved_toml(recipe, base=plan.root)
        begin = partial(write_identity, config=recipe.config, checkpoint=plan.checkpoint, step=plan.start_step)
        seed = recipe.config.train.seed
        run = RunFolder.create(plan.root, recipe=recipe.name, seed=seed, config=text, begin=begin)
        if run.root.parent == Path("runs").resolve():
            link_latest(run.root)
    else:
        run = RunFolder(plan.root)
    try:
        with run:
            if not plan.is_new:
                _go_back(plan, run=run)
            run.set_steps(plan.start_step)
            yield TrainRequest(
                config=recipe.config,
                run=run,
                start_step=plan.start_step,
                checkpoint=plan.checkpoint,
                resumed=not plan.is_new,
            )
    except UserError:
        if plan.is_new:
            run.remove_unused()
        raise


def _named(plan: Plan, unnamed: Recipe) -> Plan:
    """The plan with a folder that this process, and no other, has just made."""
    root = plan.root
    while not claim(root):
        root = new_run_path(unnamed.name).resolve()
    has_places = plan.checkpoint is None
    recipe = with_prepared(unnamed, prepared=root / "prepared") if has_places else unnamed
    return replace(plan, root=root, recipe=recipe, unnamed=None)


def link_latest(root: Path) -> None:
    """Let `latest`, beside the run folder, point to it, where that can be: no run depends on it."""
    link, fresh = root.parent / "latest", root.parent / f".latest-{os.getpid()}"
    try:
        fresh.symlink_to(root.name, target_is_directory=True)
        fresh.replace(link)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        LOG.warning("%s does not point to the newest run: %s", link, error.strerror)


def _go_back(plan: Plan, *, run: RunFolder) -> None:
    """Cut what came after the resume point, and write the settings as they now are."""
    if max(run.committed_checkpoints(), default=first_step_of(run)) != plan.start_step:
        raise RunFolderError(f"run {run.root}: has gone on meanwhile; give the same command again.")
    run.cut_after(plan.start_step)
    if flatten(load_recipe(run.config).config) != flatten(plan.recipe.config):
        write_atomic(run.config, resolved_toml(plan.recipe, base=run.root))


def _plan_resume(run: RunFolder, *, recipe: Path | None, overrides: Sequence[str]) -> Plan:
    stored = load_recipe(run.config)
    asked = load_recipe(recipe or run.config, overrides=overrides)
    wanted = with_prepared(asked, prepared=run.prepared)
    _refuse_changes(run, stored.config, wanted)
    check_identity(run, wanted.config)
    record = run.record()
    steps = wanted.config.train.steps
    committed = run.committed_checkpoints()
    origin, first_step = origin_of(run) if not committed else (None, 0)
    start_step = max(committed, default=first_step)
    if steps < start_step:
        raise ConfigError(
            f"train.steps = {steps}: must be at least {start_step}, the steps that run {run.root} has done; "
            "raise it, or start a new run."
        )
    return Plan(
        recipe=replace(wanted, name=record.recipe),
        root=run.root,
        is_new=False,
        start_step=start_step,
        checkpoint=committed.get(start_step, origin),
        finished=record.status == "finished" and steps <= record.steps,
    )


def _refuse_changes(run: RunFolder, stored: Config, wanted: Recipe) -> None:
    old, new = flatten(stored), flatten(wanted.config)
    changed = [
        key for key in KEYS if old[key] != new[key] and not _may_change(key) and not only_moved(run, wanted.config, key)
    ]
    if changed:
        lines = [f"{key} = {new[key]!r} [{wanted.sources[key]}]: the run has {old[key]!r}" for key in changed]
        raise ConfigError(
            "\n".join(lines) + f"\nA resumed run keeps its settings (but for {', '.join(FREE)} and eval.*); "
            "leave these keys as they are, or start a new run."
        )


def _may_change(key: str) -> bool:
    return key.startswith("eval.") or key in FREE


def _plan_from_checkpoint(
    checkpoint: Path, *, recipe: Path | None, overrides: Sequence[str], run_dir: Path | None
) -> Plan:
    source, step = _run_and_step(checkpoint)
    if recipe is not None:
        raise ConfigError(
            f"--resume {checkpoint}: the settings are those of its run; leave {recipe} out, and use --set for changes."
        )
    if step == max(source.committed_checkpoints()) and (run_dir is None or run_dir.resolve() == source.root):
        return _plan_resume(source, recipe=None, overrides=overrides)
    loaded = _without_prepare(load_recipe(source.config, overrides=overrides))
    _refuse_other_adapters(load_recipe(source.config).config, loaded)
    loaded = replace(loaded, name=source.record().recipe)
    check_runnable(loaded)
    if loaded.config.train.steps < step:
        raise ConfigError(f"train.steps = {loaded.config.train.steps}: must be at least {step}, the checkpoint's step.")
    root = (run_dir or new_run_path(loaded.name)).resolve()
    if RunFolder.is_run(root):
        raise RunFolderError(
            f"--resume {checkpoint}: an older checkpoint begins a new run, but {root} exists; "
            "name another --run-dir, or leave it out."
        )
    return Plan(
        recipe=loaded,
        root=root,
        is_new=True,
        start_step=step,
        checkpoint=checkpoint.resolve(),
        unnamed=loaded if run_dir is None else None,
    )


def _refuse_other_adapters(stored: Config, wanted: Recipe) -> None:
    """Adapters go on over the model that they are of; without them a checkpoint's weights are all there is."""
    if not (stored.learner.lora or wanted.config.learner.lora):
        return
    old, new = flatten(stored), flatten(wanted.config)
    changed = [
        f"{key} = {new[key]!r}: the checkpoint's run has {old[key]!r}" for key in ADAPTED if old[key] != new[key]
    ]
    if changed:
        raise ConfigError(
            "\n".join(changed) + "\nWhat is trained stays: leave these keys as they are, or start a new run with "
            "model.path = the checkpoint."
        )


def _run_and_step(checkpoint: Path) -> tuple[RunFolder, int]:
    source = RunFolder(checkpoint.resolve().parent.parent)
    if not RunFolder.is_run(source.root):
        raise RunFolderError(
            f"--resume {checkpoint}: must be auto, never, or a checkpoint of a run, such as "
            "runs/latest/checkpoints/step-000020."
        )
    for step, folder in source.committed_checkpoints().items():
        if folder == checkpoint.resolve():
            return source, step
    there = ", ".join(folder.name for folder in source.committed_checkpoints().values()) or "none"
    raise RunFolderError(f"--resume {checkpoint}: is no committed checkpoint; the run has {there}.")


def _without_prepare(recipe: Recipe) -> Recipe:
    """The same settings where all that was prepared is used from the run that made it."""
    values = {key: value for key, value in flatten(recipe.config).items() if not key.startswith("prepare.")}
    return replace(recipe, config=make_config(values, sources=recipe.sources))
