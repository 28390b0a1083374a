"""From the settings of a recipe to the plain settings of each part."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from rexrag.actors.build import RolloutSettings
from rexrag.actors.episode import EpisodeSettings
from rexrag.buffer.settings import ReplaySettings
from rexrag.config import Config
from rexrag.env.prompt import read_template
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings
from rexrag.model.adapters import AdapterSettings
from rexrag.model.loading import Device
from rexrag.retrieval.settings import RetrieverSettings, SearchActorSettings
from rexrag.run.controller import LoopSettings
from rexrag.run.engine_choice import choose_engine
from rexrag.types import Question

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import BaseModel

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


def device_of(num_gpus: float) -> Device:
    """Where a process computes to which Ray gives this share of a GPU."""
    return "cuda" if num_gpus else "cpu"


def copied(settings: type[SettingsT], section: BaseModel, **rest: object) -> SettingsT:
    """Settings of a part: the section's fields of the same names, and `rest`, which goes before them.

    Raises:
        TypeError: a field of the settings is in neither.
    """
    names = {field.name for field in fields(settings)}
    shared = {name: getattr(section, name) for name in type(section).model_fields if name in names}
    return settings(**{**shared, **rest})


def episode_settings(config: Config) -> EpisodeSettings:
    return copied(
        EpisodeSettings,
        config.env,
        group_size=config.rollout.group_size,
        probe_rate=config.probe.rate,
        branch=config.probe.branch,
        dead_end=config.probe.dead_end,
        scored=_scored(config),
        seed=config.train.seed,
        eval_episodes=config.rollout.episodes_per_actor,
        prompt_template=None if config.env.prompt_file is None else read_template(config.env.prompt_file),
    )


def _scored(config: Config) -> Literal["none", "probes", "all"]:
    """Rollouts that hint-free transfer needs scored: exact weights compare targets with probes, too."""
    if config.probe.transfer == "hinted" or config.probe.rate == 0:
        return "none"
    return "all" if config.correction.mixture in ("sequence", "normalized") else "probes"


def has_likelihood(config: Config) -> bool:
    """Whether the learner takes rewards for probabilities of being right, which are never negative (§7b)."""
    return config.correction.mixture == "normalized"


def rollout_settings(
    config: Config, *, model_path: str, num_threads: int, log_file: Path | None = None
) -> RolloutSettings:
    return RolloutSettings(
        model_path=model_path,
        episodes=episode_settings(config),
        engine=choose_engine(config).engine,
        num_sequences=config.rollout.episodes_per_actor,
        dtype=config.rollout.dtype,
        device=device_of(config.rollout.num_gpus),
        gpu_share=config.rollout.num_gpus / config.rollout.tensor_parallel,
        tensor_parallel=config.rollout.tensor_parallel,
        inflight=config.weights.inflight,
        num_threads=num_threads,
        retriever=copied(RetrieverSettings, config.retriever),
        reward_kind=config.reward.kind,
        format_weight=config.reward.format_weight,
        never_negative=has_likelihood(config),
        hints_file=config.probe.hints,
        log_file=log_file,
    )


def search_actor_settings(config: Config, *, log_file: Path | None) -> SearchActorSettings:
    retriever = config.retriever
    num_threads = max(1, int(retriever.num_cpus))
    return copied(SearchActorSettings, retriever, num_threads=num_threads, log_file=log_file)


def learner_settings(config: Config, *, rate_factor: float = 1.0) -> LearnerSettings:
    """Settings of the learner, whose learning rate is multiplied with `rate_factor`."""
    learner = config.learner
    learning_rate = rate_factor * config.optimizer.learning_rate
    return copied(
        LearnerSettings,
        learner,
        correction=copied(CorrectionSettings, config.correction),
        loss=copied(LossSettings, config.loss),
        optimizer=copied(OptimizerSettings, config.optimizer, learning_rate=learning_rate),
        probe=copied(ProbeSettings, config.probe),
        max_staleness=config.replay.max_staleness,
        max_length=config.env.max_trajectory_tokens,
    )


def adapter_settings(config: Config) -> AdapterSettings | None:
    """Those of the adapters that are trained in place of the weights; None: the weights are."""
    learner = config.learner
    return AdapterSettings(rank=learner.lora, alpha=learner.lora_alpha) if learner.lora else None


def replay_settings(
    config: Config, *, folder: Path, questions: tuple[Question, ...], log_file: Path | None, first_step: int
) -> ReplaySettings:
    return copied(
        ReplaySettings,
        config.replay,
        folder=folder,
        questions=questions,
        groups_per_step=config.train.groups_per_step,
        first_step=first_step,
        num_steps=config.train.steps,
        seed=config.train.seed,
        segment_bytes=config.replay.segment_mb << 20,
        log_file=log_file,
    )


def loop_settings(config: Config) -> LoopSettings:
    bounds = config.rollout.autoscale
    return copied(
        LoopSettings,
        config.train,
        num_steps=config.train.steps,
        eval_every=config.eval.every,
        guard=config.guard,
        autoscale=(bounds["min"], bounds["max"]) if bounds else None,
    )
