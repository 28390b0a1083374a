"""A model outside a run, for `rexrag eval` and `rexrag ask`: in this process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from rexrag.actors.build import RolloutSettings, build_runner
from rexrag.config import Config
from rexrag.env.prompt import render_prompt
from rexrag.errors import ConfigError, RetrieverError, RunFailure
from rexrag.model.checks import check_model
from rexrag.model.supported import check_context
from rexrag.processes import num_cores
from rexrag.recipe import flatten, load_recipe, make_config
from rexrag.retrieval.open import check_retriever, is_server, target_kind
from rexrag.run.part_settings import rollout_settings
from rexrag.run_folder import resolve_model_or_run, run_of
from rexrag.types import EpisodeScore, Question, WeightVersion


def settings_for(
    model: str,
    *,
    index: str,
    token_file: Path | None = None,
    encoder: Path | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, RolloutSettings]:
    """The model that is meant, and its episodes: with the settings of its run where it has one, else the defaults.

    Args:
        index: index folder, or URL of a retriever server.
        recipe: whose prompt and limits hold in place of the run's; overrides: over these, or over the run's.
        token_file, encoder: of that server, or that dense index; None: the run's, where it is the run's own.

    Raises:
        UserError: no such model, or no usable index.
    """
    path = resolve_model_or_run(model)
    checked = check_model(path)
    run = run_of(path)
    named = recipe or (None if run is None else run.config)
    config = _settings_in(named, overrides=overrides)
    kind = target_kind(index)
    # A model that was spread over GPUs may need as many here.
    spread = config.rollout.tensor_parallel if torch.cuda.device_count() >= config.rollout.tensor_parallel else 1
    own = _is_own(config, index)
    defaults = Config()
    values = {
        **flatten(config),
        "model.path": str(path),
        "rollout.engine": "auto",  # the run's own may not be installed here
        "rollout.num_gpus": float(spread * torch.cuda.is_available()),
        "rollout.tensor_parallel": spread,
        "retriever.kind": kind,
        # A run's token is for its own server, its encoder for its own index.
        "retriever.token_file": token_file or (config.retriever.token_file if own else None),
        "retriever.encoder": encoder or (config.retriever.encoder if own else None),
        "retriever.url": index if kind == "http" else None,
        "retriever.path": None if kind == "http" else Path(index),
        # No group is leased here.
        "replay.lease_timeout_s": defaults.replay.lease_timeout_s,
        "replay.lease_deadline_s": defaults.replay.lease_deadline_s,
    }
    if named is None:
        values["env.max_trajectory_tokens"] = _fitting_limit(config, checked.config)
    settings = rollout_settings(make_config(values, sources={}), model_path=str(path), num_threads=num_cores())
    if kind == "http":
        check_retriever(settings.retriever, top_k=settings.episodes.top_k)
    # Nothing is probed: a run's file of hints may be gone, and no hint is scored.
    settings = replace(settings, hints_file=None, episodes=replace(settings.episodes, scored="none"))
    check_context(checked.config, settings.episodes.max_trajectory_tokens)
    render_prompt(
        "?",
        codec=checked.codec,
        template=settings.episodes.prompt_template,
        system_prompt=settings.episodes.system_prompt,
    )
    return path, settings


def _settings_in(recipe: Path | None, *, overrides: Sequence[str]) -> Config:
    if recipe is not None:
        return load_recipe(recipe, overrides=overrides).config
    if overrides:
        raise ConfigError(f"--set {overrides[0]}: is over a run's settings, or a recipe's; name one with --recipe")
    return Config()


def _is_own(config: Config, index: str) -> bool:
    """Whether it is what the run searched."""
    retriever = config.retriever
    if is_server(index):
        return retriever.url is not None and retriever.url.rstrip("/") == index.rstrip("/")
    return retriever.path is not None and retriever.path.resolve() == Path(index).resolve()


def _fitting_limit(config: Config, model: PretrainedConfig) -> int:
    """The default limit of a trajectory, less where the context of a model without a run is shorter."""
    env = config.env
    limit = env.max_trajectory_tokens
    context = int(getattr(model, "max_position_embeddings", None) or limit)
    # Below a turn or an observation no smaller limit would do: the check of the context says so.
    return min(limit, context) if context > max(env.max_turn_tokens, env.max_observation_tokens) else limit


def named_step(model: Path) -> int:
    """The learner step of a run's checkpoint, 0 for any other model."""
    number = model.name.removeprefix("step-")
    return int(number) if number.isdigit() and run_of(model) is not None else 0


def evaluate(
    settings: RolloutSettings,
    *,
    questions: Sequence[Question],
    step: int,
    on_score: Callable[[EpisodeScore], None] | None = None,
) -> list[EpisodeScore]:
    """Greedy episodes of all questions.

    Raises:
        RunFailure: the retriever gave no result in the end.
    """
    version = WeightVersion(incarnation="standalone", step=step)
    try:
        return asyncio.run(_evaluate(settings, questions=questions, version=version, on_score=on_score))
    except RetrieverError as error:
        raise RunFailure(str(error)) from None


async def _evaluate(
    settings: RolloutSettings,
    *,
    questions: Sequence[Question],
    version: WeightVersion,
    on_score: Callable[[EpisodeScore], None] | None,
) -> list[EpisodeScore]:
    runner, engine = build_runner(settings, version=version)
    try:
        return await runner.evaluate(questions, on_score=on_score)
    finally:
        await engine.close()


def ask(model: str, *, question: str, index: str, token_file: Path | None = None, encoder: Path | None = None) -> str:
    """The trace of one greedy episode.

    Raises:
        UserError: no such model, or no usable index.
        RunFailure: the retriever gave no result in the end.
    """
    path, settings = settings_for(model, index=index, token_file=token_file, encoder=encoder)
    asked = Question(id="asked", data_source="ask", question=question, golden_answers=("",))
    [score] = evaluate(settings, questions=[asked], step=named_step(path))
    assert score.text is not None, "a greedy episode has its text"
    return score.text
