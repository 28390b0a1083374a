"""Settings: all tables of a recipe, and what must hold between them. Unknown keys fail and name the nearest known one.

Precedence: default < the set that `method` names < recipe < `--set` (`rexrag.recipe` applies it).
This module imports no torch, ray or vllm.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from rexrag.retrieval.settings import REMOTE, RetrieverConfig
from rexrag.sections import (
    CorrectionConfig,
    DataConfig,
    EnvConfig,
    EvalConfig,
    LearnerConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    ProbeConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrainConfig,
    WeightsConfig,
)


class Config(Section):
    """All settings of a run."""

    method: Literal["grpo", "maxrl", "paper", "exact", "rex"] = Field(
        "rex", description="Vetted set of switches; single keys override it."
    )
    guard: Literal["off", "warn", "rewind"] = Field(
        "warn",
        description="Where the policy breaks: nothing, a warning, or the run goes back to its last good checkpoint and "
        "on at half the learning rate.",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    env: EnvConfig = EnvConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    weights: WeightsConfig = WeightsConfig()
    probe: ProbeConfig = ProbeConfig()
    correction: CorrectionConfig = CorrectionConfig()
    loss: LossConfig = LossConfig()
    replay: ReplayConfig = ReplayConfig()
    learner: LearnerConfig = LearnerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    prepare: PrepareConfig = PrepareConfig()

    @model_validator(mode="after")
    def _check_together(self) -> Config:
        problems = [
            *_env_problems(self.env),
            *_training_problems(self),
            *_lease_problems(self),
            *_estimator_problems(self),
            *_prepare_problems(self.prepare),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _env_problems(env: EnvConfig) -> list[str]:
    return [
        f"env.{name} = {value}: must be less than env.max_trajectory_tokens ({env.max_trajectory_tokens}), "
        "which counts the prompt and all turns; lower the one or raise the other."
        for name in ("max_turn_tokens", "max_observation_tokens")
        if (value := getattr(env, name)) >= env.max_trajectory_tokens
    ]


def _training_problems(config: Config) -> list[str]:
    problems = []
    size = config.rollout.group_size
    if size == 1 and config.probe.rate == 0:
        problems.append(
            "rollout.group_size = 1: must be at least 2 where probe.rate is 0, since a single rollout has nothing "
            "to be compared with; raise one of the two."
        )
    elif size == 1 and config.loss.baseline == "loo":
        problems.append(
            'rollout.group_size = 1: must be at least 2 where loss.baseline is "loo", which compares a target and '
            'its probes with other targets; raise it, or set loss.baseline = "joint".'
        )
    if config.reward.format_weight > 0 and config.reward.kind != "em + format":
        problems.append(
            f"reward.format_weight = {config.reward.format_weight}: has no effect with reward.kind = "
            f'"{config.reward.kind}"; set reward.kind = "em + format", or leave the weight out.'
        )
    bounds = config.rollout.autoscale
    if bounds and set(bounds) != {"min", "max"}:
        problems.append("rollout.autoscale: needs both min and max, such as { min = 1, max = 8 }.")
    elif bounds and bounds["min"] > bounds["max"]:
        problems.append(
            f"rollout.autoscale: min = {bounds['min']} must be at most max = {bounds['max']}; lower the one or raise "
            "the other."
        )
    return problems + _engine_problems(config.rollout) + _rank_problems(config.learner)


def _rank_problems(learner: LearnerConfig) -> list[str]:
    if learner.num_ranks > 1 and learner.num_gpus not in (None, 0, 1):
        return [
            f"learner.num_gpus = {learner.num_gpus:g}: must be 1 or 0 with learner.num_ranks = {learner.num_ranks}, "
            "since ranks cannot share a GPU; set it, or leave it out."
        ]
    return []


def _engine_problems(rollout: RolloutConfig) -> list[str]:
    width = rollout.tensor_parallel
    if width > 1 and rollout.engine == "torch":
        return [
            f'rollout.tensor_parallel = {width}: must be 1 with rollout.engine = "torch", which computes on one device '
            'alone; set it, or set rollout.engine = "vllm".'
        ]
    if width > 1 and 0 < rollout.num_gpus != width:
        return [
            f"rollout.tensor_parallel = {width}: must be the number of GPUs of each actor, and rollout.num_gpus is "
            f"{rollout.num_gpus:g}; set both to the same number."
        ]
    if width == 1 and rollout.num_gpus > 1:
        return [
            f"rollout.num_gpus = {rollout.num_gpus:g}: must be at most 1 with rollout.tensor_parallel = 1, where an "
            "engine computes on one GPU; set both to the same number, or lower this one and have more actors."
        ]
    return []


def _lease_problems(config: Config) -> list[str]:
    replay, retriever = config.replay, config.retriever
    problems = []
    if replay.lease_timeout_s > replay.lease_deadline_s:
        problems.append(
            f"replay.lease_timeout_s = {replay.lease_timeout_s}: must be at most replay.lease_deadline_s "
            f"({replay.lease_deadline_s}); lower the one or raise the other."
        )
    if retriever.kind in REMOTE and replay.lease_timeout_s <= retriever.silent_s:
        problems.append(
            f"replay.lease_timeout_s = {replay.lease_timeout_s:g}: must be above {retriever.silent_s:g}, the seconds "
            f"that one search may take with retriever.timeout_s = {retriever.timeout_s:g} and retriever.max_retries = "
            f"{retriever.max_retries}, or groups that wait for it go to another actor; raise it, or lower one of these."
        )
    return problems


def _estimator_problems(config: Config) -> list[str]:
    """Switches that only together are an estimator."""
    probe, loss = config.probe, config.loss
    problems = []
    if probe.transfer == "hint_free" and probe.rate > 0 and probe.filter != "none":
        problems.append(
            f'probe.filter = "{probe.filter}": must be "none" with probe.transfer = "hint_free", where a hint\'s own '
            "probability says nothing; set it, and lower probe.rate where that is too many probes."
        )
    if config.replay.refill and loss.preserve > 0:
        problems.append(f"loss.preserve = {loss.preserve}: must be 0 with replay.refill, which drops solved groups.")
    mixture = config.correction.mixture
    if mixture not in ("sequence", "normalized"):
        return problems
    if mixture == "normalized" and loss.baseline != "joint":
        problems.append(
            f'loss.baseline = "{loss.baseline}": has no effect with correction.mixture = "normalized", which compares '
            'a row with its share of the weights; set loss.baseline = "joint", or another mixture.'
        )
    needed: dict[str, tuple[object, object]] = {
        "probe.dead_end": (probe.dead_end, "rollout"),
        "probe.filter": (probe.filter, "none"),
        "loss.train_hints": (loss.train_hints, True),
        "loss.train_prefix": (loss.train_prefix, True),
    }
    return problems + [
        f'{key} = {value!r}: must be {wanted!r} with correction.mixture = "{mixture}", whose weights are those of '
        "whole trajectories; set it, or another mixture."
        for key, (value, wanted) in needed.items()
        if value != wanted
    ]


def _prepare_problems(prepare: PrepareConfig) -> list[str]:
    needs = {
        "prepare.index": (prepare.index is not None, ("world",)),
        "prepare.warmstart": (prepare.warmstart, ("model", "world")),
        'prepare.model = "tiny"': (prepare.model == "tiny", ("world",)),
    }
    return [
        f"{name}: needs prepare.{other}, from which it is made; set prepare.{other}, or leave it out."
        for name, (wanted, others) in needs.items()
        for other in others
        if wanted and getattr(prepare, other) is None
    ]


_ALONE: Final = ("method", "guard")
TABLES: Final[tuple[str, ...]] = tuple(name for name in Config.model_fields if name not in _ALONE)
KEYS: Final[tuple[str, ...]] = (
    *_ALONE,
    *(f"{table}.{name}" for table in TABLES for name in type(getattr(Config(), table)).model_fields),
)
"""All dotted keys, in the order of a recipe."""
