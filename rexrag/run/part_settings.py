"""From the settings of a recipe to the plain settings of each part."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from rexrag.actors.build import RolloutSettings
from rexrag.actors.episode import EpisodeSettings
from rexrag.buffer.settings import ReplaySettings
from rexrag.config import Config
from rexrag.env.prompt import read_template
from rexrag.errors import ConfigError, counted
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings
from rexrag.model.loading import Device, fastest_dtype
from rexrag.retrieval.settings import RetrieverSettings, SearchActorSettings
from rexrag.run.controller import LoopSettings
from rexrag.run.engine_choice import choose_engine
from rexrag.types import Question

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import BaseModel

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How cores and GPUs are shared. `num_groups`: groups that one actor runs at once."""

    num_actors: int
    num_groups: int
    actor_threads: int
    learner_threads: int
    cpus_per_process: float
    actor_gpus: float
    learner_gpus: float
    num_searchers: int
    searcher_cpus: float
    searcher_gpus: float


def device_of(num_gpus: float) -> Device:
    """Where a process computes to which Ray gives this share of a GPU."""
    return "cuda" if num_gpus else "cpu"


def plan_layout(config: Config, *, num_cores: int, node_cores: int, num_gpus: float) -> Layout:
    """Actors and threads for a cluster: half as many actors as cores, at least one; on GPUs as many as they hold.

    Learner and actors each get threads for all cores of a node. When both compute they share them, and whenever one
    waits, in evaluations, at the end of a batch or in a synchronous run, the other has the machine.

    Of the GPUs the learner's share comes first: a whole one where there are more, else what one actor leaves.

    Args:
        num_cores, num_gpus: of the cluster, GPUs that torch can use. node_cores: of its largest node.

    Raises:
        ConfigError: learner and actors reserve more GPUs than the cluster has, for which Ray would wait for ever, or
            actors on GPUs would leave none for the learner.
    """
    share = config.rollout.num_gpus
    pool_cpus, pool_gpus = _pool_share(config, num_cores=num_cores)
    learner_gpus = _learner_gpus(config, num_gpus - pool_gpus)
    if config.rollout.num_actors is not None:
        num_actors = config.rollout.num_actors
    else:
        left = num_gpus - pool_gpus
        num_actors = max(1, _actors_on(left, learner_gpus, share) if share else int(num_cores - pool_cpus) // 2)
    needed_gpus = num_actors * share + learner_gpus + pool_gpus
    if needed_gpus > num_gpus:
        pool = f", and a pool of search actors with {pool_gpus:g}," if pool_gpus else ""
        raise ConfigError(
            f"{counted(num_actors, 'rollout actor')} with rollout.num_gpus = {share:g} and a learner with "
            f"{learner_gpus:g}{pool} need {counted(needed_gpus, 'GPU')}, the cluster has {num_gpus:g} that torch can "
            "use: lower these shares or rollout.num_actors, or set the shares to 0 to compute on CPUs"
        )
    has_pool = config.retriever.kind == "ray"
    actor_threads = config.rollout.threads_per_actor or max(1, min(num_cores // num_actors, node_cores))
    return Layout(
        num_actors=num_actors,
        num_groups=max(1, config.rollout.episodes_per_actor // config.rollout.group_size),
        actor_threads=actor_threads,
        learner_threads=config.learner.threads or node_cores,
        cpus_per_process=min(1.0, (num_cores - pool_cpus) / (num_actors + 1)),
        actor_gpus=share,
        learner_gpus=learner_gpus,
        num_searchers=config.retriever.num_actors if has_pool else 0,
        searcher_cpus=config.retriever.num_cpus if has_pool else 0.0,
        searcher_gpus=config.retriever.num_gpus if has_pool else 0.0,
    )


def _pool_share(config: Config, *, num_cores: int) -> tuple[float, float]:
    """Cores and GPUs of the search actors together.

    Raises:
        ConfigError: they would leave no core for the rest of the run.
    """
    retriever = config.retriever
    if retriever.kind != "ray":
        return 0.0, 0.0
    cpus = retriever.num_actors * retriever.num_cpus
    if cpus >= num_cores:
        raise ConfigError(
            f"{counted(retriever.num_actors, 'search actor')} with retriever.num_cpus = {retriever.num_cpus:g} would "
            f"take {cpus:g} of the cluster's {counted(num_cores, 'core')}, which leaves none to the rest of the run: "
            "lower retriever.num_actors or retriever.num_cpus"
        )
    return cpus, retriever.num_actors * retriever.num_gpus


def _learner_gpus(config: Config, num_gpus: float) -> float:
    if config.learner.num_gpus is not None:
        return config.learner.num_gpus
    taken = (config.rollout.num_actors or 1) * config.rollout.num_gpus
    left = min(1.0, max(0.0, num_gpus - taken))
    if taken and num_gpus and not left:
        raise ConfigError(
            f"rollout.num_gpus = {config.rollout.num_gpus:g}: with {counted(config.rollout.num_actors or 1, 'actor')} "
            f"the {counted(num_gpus, 'GPU')} of the cluster would be used up, and the learner would be on the CPU; "
            "lower it, such as to 0.5, or say learner.num_gpus = 0 if that is meant"
        )
    return left


def _actors_on(num_gpus: float, learner_gpus: float, share: float) -> int:
    """Actors that fit beside the learner; one does not lie over two GPUs."""
    beside_learner = int((1.0 - learner_gpus) / share + 1e-9) if 0.0 < learner_gpus < 1.0 else 0
    return beside_learner + int(num_gpus - math.ceil(learner_gpus)) * int(1.0 / share + 1e-9)


def describe_layout(layout: Layout) -> list[str]:
    """Which part gets which share, a line each."""

    def place(gpus: float) -> str:
        return f"{gpus:g} of a GPU" if 0 < gpus < 1 else counted(gpus, "GPU") if gpus else "on the CPU"

    searchers = [
        f"{counted(layout.num_searchers, 'search actor')}: {counted(layout.searcher_cpus, 'core')} each, "
        f"{place(layout.searcher_gpus)}"
    ]
    return [
        *(searchers if layout.num_searchers else []),
        f"{counted(layout.num_actors, 'rollout actor')}: {counted(layout.actor_threads, 'thread')} each, "
        f"{place(layout.actor_gpus)}, {counted(layout.num_groups, 'group')} at once",
        f"learner: {counted(layout.learner_threads, 'thread')}, {place(layout.learner_gpus)}",
    ]


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
        gpu_share=config.rollout.num_gpus,
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
    return copied(SearchActorSettings, config.retriever, log_file=log_file)


def learner_settings(config: Config, *, device: Device) -> LearnerSettings:
    learner = config.learner
    return copied(
        LearnerSettings,
        learner,
        correction=copied(CorrectionSettings, config.correction),
        loss=copied(LossSettings, config.loss),
        optimizer=copied(OptimizerSettings, config.optimizer),
        probe=copied(ProbeSettings, config.probe),
        max_staleness=config.replay.max_staleness,
        max_length=config.env.max_trajectory_tokens,
        autocast=fastest_dtype(device) if learner.autocast == "auto" else learner.autocast,
    )


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
    fastest = fastest_dtype(device_of(config.rollout.num_gpus))
    return copied(
        LoopSettings,
        config.train,
        num_steps=config.train.steps,
        eval_every=config.eval.every,
        transfer_dtype=fastest if config.rollout.dtype == "auto" else config.rollout.dtype,
    )
