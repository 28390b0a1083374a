"""From the settings of a recipe to the plain settings of each part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rexrag.actors.build import RolloutSettings
from rexrag.actors.episode import EpisodeSettings
from rexrag.buffer.settings import ReplaySettings
from rexrag.config import Config
from rexrag.env.prompt import read_template
from rexrag.errors import ConfigError
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings
from rexrag.model.loading import Device, fastest_dtype
from rexrag.types import Question


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How cores and GPUs are shared. `num_groups`: groups that one actor runs at once."""

    num_actors: int
    num_groups: int
    actor_threads: int
    learner_threads: int
    cpus_per_process: float
    learner_gpus: float


def device_of(num_gpus: float) -> Device:
    """Where a process computes to which Ray gives this share of a GPU."""
    return "cuda" if num_gpus else "cpu"


def plan_layout(config: Config, *, num_cores: int, node_cores: int, num_gpus: float) -> Layout:
    """Actors and threads for a cluster: half as many actors as cores, at least one; on GPUs one for each of them.

    Learner and actors each get threads for all cores of a node. When both compute they share them, and whenever one
    waits, in evaluations, at the end of a batch or in a synchronous run, the other has the machine.

    Args:
        num_cores, num_gpus: of the cluster, GPUs that torch can use. node_cores: of its largest node.

    Raises:
        ConfigError: learner and actors reserve more GPUs than the cluster has; Ray would wait for them for ever.
    """
    share = config.rollout.num_gpus
    num_actors = config.rollout.num_actors or max(1, int(num_gpus) if share else num_cores // 2)
    left = num_gpus - num_actors * share
    learner_gpus = min(1.0, max(0.0, left)) if config.learner.num_gpus is None else config.learner.num_gpus
    if learner_gpus > left:
        raise ConfigError(
            f"{num_actors} rollout actors with rollout.num_gpus = {share:g} and a learner with {learner_gpus:g} need "
            f"{num_actors * share + learner_gpus:g} GPUs, the cluster has {num_gpus:g} that torch can use: "
            f"lower these shares or rollout.num_actors, or set both shares to 0 to compute on CPUs"
        )
    actor_threads = config.rollout.threads_per_actor or max(1, min(num_cores // num_actors, node_cores))
    return Layout(
        num_actors=num_actors,
        num_groups=max(1, config.rollout.episodes_per_actor // config.rollout.group_size),
        actor_threads=actor_threads,
        learner_threads=config.learner.threads or node_cores,
        cpus_per_process=min(1.0, num_cores / (num_actors + 1)),
        learner_gpus=learner_gpus,
    )


def episode_settings(config: Config) -> EpisodeSettings:
    env = config.env
    return EpisodeSettings(
        group_size=config.rollout.group_size,
        max_turns=env.max_turns,
        max_turn_tokens=env.max_turn_tokens,
        max_observation_tokens=env.max_observation_tokens,
        max_trajectory_tokens=env.max_trajectory_tokens,
        top_k=env.top_k,
        probe_rate=config.probe.rate,
        branch=config.probe.branch,
        dead_end=config.probe.dead_end,
        scored=_scored(config),
        seed=config.train.seed,
        eval_episodes=config.rollout.episodes_per_actor,
        prompt_template=None if env.prompt_file is None else read_template(env.prompt_file),
        system_prompt=env.system_prompt,
    )


def _scored(config: Config) -> Literal["none", "probes", "all"]:
    """Rollouts that hint-free transfer needs scored: exact weights compare targets with probes, too."""
    if config.probe.transfer == "hinted" or config.probe.rate == 0:
        return "none"
    return "all" if config.correction.mixture == "sequence" else "probes"


def rollout_settings(
    config: Config, *, model_path: str, num_threads: int, log_file: Path | None = None
) -> RolloutSettings:
    retriever = config.retriever
    return RolloutSettings(
        model_path=model_path,
        episodes=episode_settings(config),
        num_sequences=config.rollout.episodes_per_actor,
        dtype=config.rollout.dtype,
        device=device_of(config.rollout.num_gpus),
        inflight=config.weights.inflight,
        num_threads=num_threads,
        retriever_kind=retriever.kind,
        retriever_path=retriever.path,
        retriever_url=retriever.url,
        retriever_timeout_s=retriever.timeout_s,
        retriever_max_retries=retriever.max_retries,
        reward_kind=config.reward.kind,
        format_weight=config.reward.format_weight,
        hints_file=config.probe.hints,
        log_file=log_file,
    )


def learner_settings(config: Config, *, device: Device) -> LearnerSettings:
    correction, loss, optimizer, learner = config.correction, config.loss, config.optimizer, config.learner
    return LearnerSettings(
        correction=CorrectionSettings(
            mixture=correction.mixture,
            bound=correction.bound,
            cap=correction.cap,
            low=correction.low,
            high=correction.high,
        ),
        loss=LossSettings(
            baseline=loss.baseline,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
            kl_coef=loss.kl_coef,
            train_hints=loss.train_hints,
            train_prefix=loss.train_prefix,
            preserve=loss.preserve,
            preserve_knee=loss.preserve_knee,
            preserve_rows=loss.preserve_rows,
        ),
        optimizer=OptimizerSettings(
            learning_rate=optimizer.learning_rate,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
        ),
        probe=ProbeSettings(
            rate=config.probe.rate,
            branch=config.probe.branch,
            transfer=config.probe.transfer,
            filter=config.probe.filter,
        ),
        max_staleness=config.replay.max_staleness,
        micro_batch_tokens=learner.micro_batch_tokens,
        autocast=fastest_dtype(device) if learner.autocast == "auto" else learner.autocast,
        gradient_checkpointing=learner.gradient_checkpointing,
        max_bad_steps=learner.max_bad_steps,
    )


def replay_settings(
    config: Config, *, folder: Path, questions: tuple[Question, ...], log_file: Path | None = None
) -> ReplaySettings:
    replay = config.replay
    return ReplaySettings(
        folder=folder,
        questions=questions,
        groups_per_step=config.train.groups_per_step,
        num_steps=config.train.steps,
        max_staleness=replay.max_staleness,
        seed=config.train.seed,
        lease_timeout_s=replay.lease_timeout_s,
        lease_deadline_s=replay.lease_deadline_s,
        max_attempts=replay.max_attempts,
        segment_bytes=replay.segment_mb << 20,
        refill=replay.refill,
        log_file=log_file,
    )
