"""Settings: one sentence and bounds for each field. Unknown keys fail and name the nearest known one.

Precedence: default < the set that `method` names < recipe < `--set` (`rexrag.recipe` applies it).
This module imports no torch, ray or vllm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rexrag.retrieval.settings import REMOTE, RetrieverConfig


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


Paths = Annotated[list[Path], BeforeValidator(_as_list)]
"""One path, or a list of them."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str | None = Field(None, description="Model folder, hub id, or GGUF file of a causal language model.")


class DataConfig(Section):
    train: Paths = Field([], description="Question files to train on (jsonl or parquet).")
    dev: Paths = Field(
        [], description="Questions evaluated every `eval.every` steps; settings and best checkpoint go by them."
    )
    eval: Paths = Field([], description="Held-out questions, evaluated before and after training.")
    skip_bad_rows: bool = Field(False, description="Count and skip bad rows instead of stopping at the first.")


class EnvConfig(Section):
    max_turns: int = Field(
        5,
        ge=0,
        le=64,
        description="Searches and malformed turns before the last turn; a trajectory has at most max_turns + 1 turns.",
    )
    max_turn_tokens: int = Field(500, ge=1, description="Most tokens of one turn, hint tokens included.")
    max_observation_tokens: int = Field(
        500, ge=16, description="Most tokens of one observation; cut at passage boundaries."
    )
    max_trajectory_tokens: int = Field(
        4096, ge=32, description="Most tokens of a trajectory, prompt included; reaching it ends the episode."
    )
    top_k: int = Field(3, ge=1, le=100, description="Passages per search.")
    prompt_file: Path | None = Field(
        None, description="Text of the user message with {question} in it, in place of the built-in one."
    )
    system_prompt: str | None = Field(None, description="System message; None leaves it to the chat template.")


class RewardConfig(Section):
    kind: str = Field(
        "em",
        description="`em`, `f1`, `em + format`, or `module:function` of your own (prediction, golds, row) -> float.",
        pattern=r"^(em|f1|em \+ format|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
    )
    format_weight: float = Field(0.0, ge=0, le=1, description="Weight of the format score in `em + format`.")


class RolloutConfig(Section):
    engine: Literal["auto", "torch", "vllm"] = Field("auto", description="`auto`: vLLM on GPUs where it is installed.")
    num_actors: int | None = Field(
        None, ge=1, description="Rollout actors; None: one per two cores, or as many as fit on the GPUs they share."
    )
    threads_per_actor: int | None = Field(
        None, ge=1, description="Torch threads of each actor; None: cores divided by actors."
    )
    group_size: int = Field(5, ge=1, le=256, description="Target rollouts per question.")
    episodes_per_actor: int = Field(64, ge=1, le=4096, description="Episodes that one engine runs at once.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of sampling; `auto` takes bfloat16 where the processor is faster in it."
    )
    num_gpus: float = Field(
        0.0, ge=0, le=1, description="Share of a GPU that Ray reserves for each actor's engine, 0: it is on the CPU."
    )


class WeightsConfig(Section):
    inflight: Literal["keep", "recompute"] = Field(
        "keep",
        description="At a weight change running sequences go on over their KV cache, or are prefilled again first.",
    )


class ProbeConfig(Section):
    rate: Share = Field(0.5, description="Probability that a dead end is probed.")
    transfer: Literal["hinted", "hint_free"] = Field(
        "hinted", description="Probes are trained with their hint in the context, or as if it had not been there."
    )
    dead_end: Literal["rollout", "group"] = Field(
        "rollout",
        description="Probes fork from each failed rollout the moment it fails, or from those of a question whose "
        "targets all failed.",
    )
    branch: Literal["answer", "turn"] = Field(
        "answer", description="Fork before the failed action's tag, or at the start of its turn."
    )
    filter: Literal["hint_logprob", "none"] = Field(
        "none", description="Keep the probes whose hints the policy finds likeliest, or all."
    )
    hints: Path | None = Field(None, description="File of exploration hints, one a line; None: the built-in pool.")


class CorrectionConfig(Section):
    mixture: Literal["token", "sequence", "normalized", "none"] = Field(
        "normalized",
        description="Weights for probe mixing: the paper's per token, the exact ones per trajectory, these as shares "
        "of their question's in the advantage, or none.",
    )
    bound: Literal["truncate", "mask", "none"] = Field(
        "truncate", description="What is done with large staleness weights."
    )
    cap: float = Field(2.0, ge=1.0, description="Bound of `truncate`.")
    low: float = Field(0.5, gt=0, le=1.0, description="Lower bound of `mask`.")
    high: float = Field(2.0, ge=1.0, description="Upper bound of `mask`.")


class LossConfig(Section):
    baseline: Literal["joint", "target", "loo"] = Field(
        "joint", description="What a reward is compared with inside its group."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="Ratio clip below 1.")
    clip_high: float = Field(0.2, gt=0, description="Ratio clip above 1.")
    dual_clip: float = Field(3.0, gt=1, description="Bound of the loss for negative advantages.")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL to the reference model; 0 loads none.")
    train_hints: bool = Field(True, description="Hint tokens carry loss.")
    train_prefix: bool = Field(True, description="A probe's prefix carries loss too, beside its parent's.")
    preserve: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="Weight of the penalty on likelihood that solved groups lose; 0: none. No step goes against them.",
    )
    preserve_knee: float = Field(
        0.5,
        ge=0,
        le=100,
        description="Fall in log-prob, in nats, up to which that penalty is quadratic, so that what has hardly been "
        "lost is hardly given back; 0: it is the fall itself.",
    )
    preserve_rows: int = Field(16, ge=1, le=64, description="Rows of solved groups that a step trains on for that.")


class ReplayConfig(Section):
    max_staleness: int = Field(
        2,
        ge=0,
        le=64,
        description="Most learner steps between the oldest token of a group and its consumption; 0 is synchronous.",
    )
    lease_timeout_s: float = Field(
        300.0, gt=0, description="A leased group without progress for so long goes to another actor."
    )
    lease_deadline_s: float = Field(
        3600.0, gt=0, description="A leased group older than this goes to another actor, progress or not."
    )
    max_attempts: int = Field(
        3, ge=1, le=100, description="Times that a question is asked again after lost or broken groups."
    )
    refill: bool = Field(
        False, description="Drop groups with equal rewards and ask other questions in their place, as DAPO does."
    )
    segment_mb: int = Field(64, ge=1, le=4096, description="Size at which the log begins a new segment, MiB.")


class LearnerConfig(Section):
    micro_batch_tokens: int = Field(4096, ge=16, description="Most tokens of one forward and backward pass.")
    threads: int | None = Field(None, ge=1, description="Torch threads of the learner; None: all cores of a node.")
    autocast: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the linear layers; master weights are float32."
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of a GPU that Ray reserves for the learner's model, 0: on the CPU; None: a whole one, or "
        "what a rollout actor leaves of the only one.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    max_bad_steps: int = Field(
        3, ge=1, description="Consecutive steps with a non-finite loss or gradient before the run stops."
    )


class OptimizerConfig(Section):
    learning_rate: float = Field(1e-6, gt=0, le=1, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay_steps: int = Field(
        0, ge=0, description="Steps after the warm-up in which it falls linearly to a tenth, 0: it stays."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="First moment's decay.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Second moment's decay.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")


class TrainConfig(Section):
    steps: int = Field(100, ge=0, description="Learner steps of the whole run.")
    groups_per_step: int = Field(32, ge=1, description="Groups that one learner step consumes.")
    seed: int = Field(0, ge=0, description="Seed of data order and of every draw.")
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that are kept, besides the best on dev.")
    stall_timeout_s: float = Field(
        900.0, gt=0, description="Seconds without progress, of whatever the run waits for, after which it fails."
    )


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="Steps between evaluations on `data.dev`; 0: none but first and last.")
    max_questions: int | None = Field(
        None, ge=1, description="Most questions of each evaluation, the first of the files; None: all."
    )


class PrepareConfig(Section):
    """What is made under RUN/prepared/ before step 0."""

    model: Literal["smollm2-135m-instruct", "tiny"] | None = Field(None, description="Model to fetch or to make.")
    world: Literal["geo", "synthetic"] | None = Field(
        None, description="World to write: corpus, questions, demonstrations."
    )
    world_size: dict[str, int | float] = Field({}, description="Dials of the world, as `rexrag world --size`.")
    index: Literal["bm25"] | None = Field(None, description="Index to build over the world's corpus.")
    warmstart: bool = Field(False, description="Supervised start on the world's demonstrations.")
    warmstart_learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of the supervised start.")
    warmstart_batch_size: int = Field(16, ge=1, description="Demonstrations per update of the supervised start.")
    warmstart_epochs: int = Field(1, ge=1, description="Passes over the demonstrations.")
    seed: int | None = Field(None, ge=0, description="Seed of world and warm start; None: `train.seed`.")


class Config(Section):
    """All settings of a run."""

    method: Literal["grpo", "maxrl", "paper", "exact", "rex"] = Field(
        "rex", description="Vetted set of switches; single keys override it."
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
    return problems


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


TABLES: Final[tuple[str, ...]] = tuple(name for name in Config.model_fields if name != "method")
KEYS: Final[tuple[str, ...]] = (
    "method",
    *(f"{table}.{name}" for table in TABLES for name in type(getattr(Config(), table)).model_fields),
)
"""All dotted keys, in the order of a recipe."""
