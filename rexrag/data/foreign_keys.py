"""What keys of Search-R1 and verl are called here: the answer to an override that was copied from their scripts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from rexrag.config import KEYS

_ACTOR: Final = "actor_rollout_ref.actor"
_ROLLOUT: Final = "actor_rollout_ref.rollout"
_NO_CUT: Final = (
    "there is none: a prompt is never cut; `env.max_trajectory_tokens` bounds prompt and all turns together"
)
_NO_SAMPLING: Final = "there is none: training samples at 1 from the whole distribution, evaluation is greedy"
_MICRO: Final = "it is `learner.micro_batch_tokens`, in tokens"
_NO_OFFLOAD: Final = (
    "there is none: `learner.num_ranks` shares weights and optimizer out over GPUs, `learner.lora` trains few of them"
)
_GPUS: Final = "it is `learner.num_ranks`, and `rollout.num_gpus` and `rollout.num_actors` for the actors' own GPUs"
_CLOSE: Final = 0.9

FOREIGN_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "data.train_files": "it is `data.train`",
        "data.val_files": "it is `data.dev` (chooses the best checkpoint) or `data.eval` (before and after)",
        "data.train_batch_size": "it is `train.groups_per_step`, in questions",
        "data.val_batch_size": "there is none: `rollout.episodes_per_actor` bounds what runs at once",
        "data.max_prompt_length": _NO_CUT,
        "data.max_start_length": _NO_CUT,
        "data.max_response_length": "it is `env.max_turn_tokens`, of one turn",
        "data.max_obs_length": "it is `env.max_observation_tokens`",
        "max_turns": "it is `env.max_turns`",
        "retriever.topk": "it is `env.top_k`",
        "actor_rollout_ref.model.path": "it is `model.path`",
        "actor_rollout_ref.model.lora_rank": "it is `learner.lora`",
        "actor_rollout_ref.model.lora_alpha": "it is `learner.lora_alpha`",
        "actor_rollout_ref.model.target_modules": "there is none: always all linear layers of the blocks",
        "actor_rollout_ref.model.enable_gradient_checkpointing": "it is `learner.gradient_checkpointing`",
        f"{_ROLLOUT}.n": "it is `rollout.group_size`",
        f"{_ROLLOUT}.n_agent": "it is `rollout.group_size`",
        f"{_ROLLOUT}.name": "it is `rollout.engine`",
        f"{_ROLLOUT}.tensor_model_parallel_size": "it is `rollout.tensor_parallel`, with as many `rollout.num_gpus`",
        f"{_ROLLOUT}.gpu_memory_utilization": "there is none: memory follows `rollout.num_gpus`",
        f"{_ROLLOUT}.temperature": _NO_SAMPLING,
        f"{_ROLLOUT}.top_p": _NO_SAMPLING,
        f"{_ACTOR}.optim.lr": "it is `optimizer.learning_rate`",
        f"{_ACTOR}.optim.lr_warmup_steps_ratio": "it is `optimizer.warmup_steps`, a number of updates",
        f"{_ACTOR}.clip_ratio": "it is `loss.clip_low` and `loss.clip_high`",
        f"{_ACTOR}.clip_ratio_low": "it is `loss.clip_low`",
        f"{_ACTOR}.clip_ratio_high": "it is `loss.clip_high`",
        f"{_ACTOR}.use_kl_loss": "it is `loss.kl_coef`; 0 loads no reference model",
        f"{_ACTOR}.kl_loss_type": "there is none: `loss.kl_coef` is of the k3 estimate, always",
        f"{_ACTOR}.entropy_coeff": "there is none: no bonus on entropy",
        f"{_ACTOR}.loss_agg_mode": "there is none: the loss is a mean over all trained tokens of the step",
        f"{_ACTOR}.fsdp_config.param_offload": _NO_OFFLOAD,
        f"{_ACTOR}.fsdp_config.grad_offload": _NO_OFFLOAD,
        f"{_ACTOR}.fsdp_config.optimizer_offload": _NO_OFFLOAD,
        f"{_ACTOR}.kl_loss_coef": "it is `loss.kl_coef`",
        f"{_ACTOR}.grad_clip": "it is `optimizer.max_grad_norm`",
        f"{_ACTOR}.state_masking": "there is none: only what the policy (or a hint) wrote carries loss, always",
        f"{_ACTOR}.ppo_mini_batch_size": "there is none: one update a step",
        f"{_ACTOR}.ppo_micro_batch_size": _MICRO,
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu": _MICRO,
        f"{_ACTOR}.ppo_max_token_len_per_gpu": _MICRO,
        "algorithm.adv_estimator": 'it is `method` (`grpo` is method = "grpo") and `loss.baseline`; there is no critic',
        "algorithm.kl_ctrl.kl_coef": "it is `loss.kl_coef`",
        "trainer.total_training_steps": "it is `train.steps`",
        "trainer.total_epochs": "it is `train.steps`, a number of steps",
        "trainer.save_freq": "it is `train.checkpoint_every`",
        "trainer.test_freq": "it is `eval.every`",
        "trainer.default_local_dir": "it is the option --run-dir",
        "trainer.resume_mode": "it is the option --resume",
        "trainer.n_gpus_per_node": _GPUS,
        "trainer.nnodes": _GPUS,
        "trainer.val_only": "it is the command `rexrag eval`, or `train.steps` = 0",
        "trainer.val_before_train": "there is none: `data.dev` and `data.eval` are evaluated at step 0, always",
        "trainer.project_name": "it is the option --run-dir",
        "trainer.experiment_name": "it is the option --run-dir",
        "trainer.logger": "there is none: TensorBoard and metrics.jsonl are written always",
    }
)


def counterpart(key: str) -> str | None:
    """What a key of Search-R1 or verl is here, or why it is not there; None for keys that are none of theirs.

    Hydra's `+` before a key is passed over; a misspelt key is matched with theirs where none of ours is nearer.
    """
    bare = key.lstrip("+~")
    if bare in FOREIGN_KEYS:
        return FOREIGN_KEYS[bare]
    foreign = difflib.get_close_matches(bare, FOREIGN_KEYS, n=1, cutoff=_CLOSE)
    if not foreign or "." not in bare:
        return None
    own = difflib.get_close_matches(bare, KEYS, n=1, cutoff=0.0)
    if difflib.get_close_matches(bare, [*foreign, *own], n=1, cutoff=0.0) != foreign:
        return None
    return f"`{foreign[0]}` is probably meant: {FOREIGN_KEYS[foreign[0]]}"
