"""The tables of a recipe: one sentence and bounds for each field. `rexrag.config` puts them together.

This module imports no torch, ray or vllm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


Paths = Annotated[list[Path], BeforeValidator(_as_list)]
"""One path, or a list of them."""
MAX_SEED: Final = 1_000_000_000
"""Torch takes no seeds of more than 64 bits."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


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
        500, ge=16, description="Most tokens of one observation: whole passages, then words of the next."
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
        None,
        ge=1,
        description="Rollout actors; None: one per two cores, or as many as fit on the GPUs or the cluster.",
    )
    threads_per_actor: int | None = Field(
        None, ge=1, description="Torch threads of each actor; None: cores divided by actors, on a cluster up to 4."
    )
    group_size: int = Field(5, ge=1, le=256, description="Target rollouts per question.")
    episodes_per_actor: int = Field(64, ge=1, le=4096, description="Episodes that one engine runs at once.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of sampling; `auto` takes bfloat16 where the processor is faster in it."
    )
    num_gpus: float = Field(
        0.0,
        ge=0,
        description="Share of a GPU, or number of them, that Ray reserves for each actor's engine; 0: on the CPU.",
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="GPUs of an actor that vLLM spreads its model over, for those too large for one."
    )
    resources: dict[str, Positive] = Field(
        {},
        description="Further Ray resources of each actor, such as { rollout = 1 }, by which nodes are chosen.",
    )
    autoscale: dict[Literal["min", "max"], Annotated[int, Field(ge=1)]] = Field(
        {},
        description="Bounds of the number of actors, such as { min = 1, max = 8 }, within which it follows the waits.",
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
    threads: int | None = Field(
        None,
        ge=1,
        description="Torch threads of each rank of the learner; None: all cores, on a cluster half of the largest "
        "node's, shared by the ranks.",
    )
    num_ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes that hold model, gradients and optimizer in shards (FSDP2), each with `num_gpus`.",
    )
    lora: int = Field(
        0,
        ge=0,
        le=1024,
        description="Rank of the low-rank adapters that are trained in place of the weights, beside each linear layer "
        "of the model's blocks; 0: the weights are.",
    )
    lora_alpha: int = Field(
        32, ge=1, le=65536, description="What the adapters add is scaled by it, divided by their rank."
    )
    autocast: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the linear layers; master weights are float32."
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of a GPU that Ray reserves for the learner's model, 0: on the CPU; None: a whole one, or "
        "what a rollout actor leaves of the only one. Of each rank, where there are several: 0 or 1.",
    )
    resources: dict[str, Positive] = Field(
        {}, description="Further Ray resources of the learner, such as { learner = 1 }."
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
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of data order and of every draw.")
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints; the last step always has one.")
    keep_checkpoints: int = Field(3, ge=1, description="Newest checkpoints that are kept, besides the best on dev.")
    stall_timeout_s: float = Field(
        900.0, gt=0, description="Seconds without progress, of whatever the run waits for, after which it fails."
    )


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="Steps between evaluations on `data.dev`; 0: none but first and last.")
    max_questions: int | None = Field(
        None, ge=1, description="Most questions of each evaluation, spread evenly over the files; None: all."
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
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of world and warm start; None: `train.seed`.")
