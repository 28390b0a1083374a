"""What `[prepare]` names, made under RUN/prepared/ before step 0 and reused on resume.

Each part is built beside its place and renamed when it is complete, so that what is there is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from rexrag.config import Config
from rexrag.env.prompt import read_template
from rexrag.model.checks import check_model
from rexrag.model.fetching import fetch_smollm2, smollm2_folder
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.preparation.warmstart import PromptSettings, WarmstartProgress, WarmstartResult, warm_start
from rexrag.processes import process_environment, run_in_child
from rexrag.reporting.terminal import Progress
from rexrag.retrieval.bm25 import build_bm25
from rexrag.worlds.write import world_texts, write_world


def prepare(config: Config, *, folder: Path, num_threads: int, progress: Progress) -> None:
    """Make what is missing under `folder`: world, index, model, warm start, in this order."""
    wanted = config.prepare
    seed = config.train.seed if wanted.seed is None else wanted.seed
    world, index, model, start = (folder / name for name in ("world", "index", "model", "warmstart"))
    if not wanted.model and config.model.path is not None and (wanted.world or wanted.index):
        check_model(config.model.path)  # what the run will refuse is refused before the rest takes its time
    folder.mkdir(parents=True, exist_ok=True)
    if wanted.world and not world.exists():
        progress.stage(f"writing the {wanted.world} world")
        scratch = folder / "world.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        write_world(wanted.world, scratch, seed=seed, size=wanted.world_size)
        scratch.rename(world)
    if wanted.index and not index.exists():
        progress.stage("building the index")
        build_bm25(world / "corpus.jsonl", index)
    base = _base_model(config, world=world, out=model, seed=seed, progress=progress)
    if wanted.warmstart and not start.exists():
        assert base is not None, "the recipe was checked: a warm start has a model"
        _warm_start(config, base, world=world, out=start, seed=seed, num_threads=num_threads, progress=progress)


def _base_model(config: Config, *, world: Path, out: Path, seed: int, progress: Progress) -> Path | None:
    """The model before any training."""
    kind = config.prepare.model
    if kind == "smollm2-135m-instruct":
        if out.is_symlink():  # of an older release: into a cache that another machine does not have
            out.unlink()
        if not out.exists():
            _put_smollm2(out, progress=progress)
        return out
    if kind == "tiny":
        if not out.exists():
            progress.stage("making a tiny model")
            make_tiny_model(world_texts(world), out, seed=seed)
        return out
    return None if config.model.path is None else Path(config.model.path)


def _put_smollm2(out: Path, *, progress: Progress) -> None:
    """The model itself, so that the run folder needs no cache: files of one disk are linked to, others copied."""
    if not smollm2_folder().is_dir():
        progress.stage("fetching SmolLM2-135M-Instruct")
        # Unpacking takes half a gigabyte, which this process would keep to the end of the run.
        run_in_child(fetch_smollm2, name="fetching the model", environment={}, progress=progress.note)
    scratch = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(smollm2_folder(), scratch, copy_function=_link_or_copy)
    scratch.rename(out)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def warm_start_as(
    config: Config,
    model: str | Path,
    *,
    demonstrations: Path,
    out: Path,
    seed: int,
    threads: int | None = None,
    progress: Callable[[WarmstartProgress], None],
) -> WarmstartResult:
    """`warm_start` with the prompt and the settings of a recipe.

    Raises:
        ConfigError: the recipe's prompt file cannot be used.
        ModelError, DataError, RunFailure: as `warm_start`.
    """
    env, wanted = config.env, config.prepare
    # This process is outside Ray's shares: it takes a GPU that it sees, where the learner is meant to be on one.
    on_gpu = torch.cuda.is_available() and config.learner.num_gpus != 0
    return warm_start(
        model,
        demonstrations=demonstrations,
        out=out,
        seed=seed,
        learning_rate=wanted.warmstart_learning_rate,
        batch_size=wanted.warmstart_batch_size,
        epochs=wanted.warmstart_epochs,
        prompt=PromptSettings(
            template=None if env.prompt_file is None else read_template(env.prompt_file),
            system_prompt=env.system_prompt,
        ),
        threads=threads,
        device="cuda" if on_gpu else "cpu",
        progress=progress,
    )


def _warm_start(
    config: Config, model: Path, *, world: Path, out: Path, seed: int, num_threads: int, progress: Progress
) -> None:
    progress.stage("warm start on demonstrations", total=1.0)

    def show(state: WarmstartProgress) -> None:
        progress.advance_to(state.update / state.num_updates)

    result = run_in_child(
        partial(
            warm_start_as,
            config,
            model,
            demonstrations=world / "demonstrations.jsonl",
            out=out,
            seed=seed,
            threads=num_threads,
        ),
        name="the warm start",
        environment=process_environment(num_threads),
        progress=show,
    )
    if result.depth is not None:
        progress.note(f"the dead end: {result.depth}")
