"""What a learner needs to go on bit for bit, beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainerState:
    """State of the trainer after `step` learner steps.

    Attributes:
        step: learner steps finished, the version of the weights.
        num_updates: optimizer updates, which drive the learning rate.
        success: m of §8.
        bad_steps: consecutive skipped steps.
        mean_tokens: of §7's N for weights of whole trajectories, once known.
        num_solved: solved groups that the preserving set has seen; preserved: its rows.
        branch_counts: (turn, token, seen, forked) of §4's φ.
        optimizer: moments by `<moment>/<parameter>`.
        adapters: as PEFT's files name them; empty where the weights themselves are trained.
        rng: state of torch's CPU generator.
    """

    step: int
    num_updates: int
    success: float
    bad_steps: int
    num_solved: int
    mean_tokens: float | None
    branch_counts: Sequence[tuple[int, int, float, float]]
    optimizer: Mapping[str, Tensor]
    adapters: Mapping[str, Tensor]
    preserved: Mapping[str, Tensor]
    rng: Tensor
