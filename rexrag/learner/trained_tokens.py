"""What is trained of a trajectory, and the densities that it was sampled with (§5b, §7).

Legend: T tokens of a trajectory, V tokens of it that the learner reads, E trained tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rexrag.errors import counted
from rexrag.hints import HintPool
from rexrag.model.packing import IndexArray
from rexrag.types import BoolArray, FloatArray, IntArray, Kind, Origin, Trajectory

Transfer = Literal["hinted", "hint_free"]

_POLICY = int(Origin.POLICY)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedTokens:
    """A trajectory as the learner reads it: with `hint_free` what goes of a probe's hint is not in it.

    Attributes:
        token_ids: [V].
        trained: [E] indices into `token_ids` of the tokens with m_t = 1.
        source: [E] where these tokens stand in the trajectory.
        behavior_logprob: [E] log π_v in the context of these tokens, as recorded or scored by the actor.
        policy_version: [E] the version that this is of.
        is_policy: [E] sampled by the policy; False on tokens of a hint.
    """

    token_ids: IntArray
    trained: IndexArray
    source: IndexArray
    behavior_logprob: FloatArray
    policy_version: IntArray
    is_policy: BoolArray


def hint_span(trajectory: Trajectory, *, hints: HintPool) -> tuple[int, int, int]:
    """Of a probe: first token of the hint, first token of it that goes, first token after it.

    Raises:
        ValueError: the hint in the tokens is not the one of the pool.
    """
    assert trajectory.branch_point is not None, "a probe has a branch"
    assert trajectory.hint_id is not None, "a probe has a hint"
    if not 0 <= trajectory.hint_id < len(hints):
        raise ValueError(f"hint_id is {trajectory.hint_id}, the pool has {counted(len(hints), 'hint')}")
    start = trajectory.prompt_length + trajectory.branch_point
    ids = hints.ids(trajectory.hint_id)
    if tuple(trajectory.token_ids[start : start + len(ids)]) != ids:
        raise ValueError(f"the tokens at a probe's branch are not hint {trajectory.hint_id} of this run's pool")
    return start, start + hints.kept(trajectory.hint_id), start + len(ids)


def trained_tokens(
    trajectory: Trajectory, *, hints: HintPool, transfer: Transfer, train_hints: bool, train_prefix: bool
) -> TrainedTokens:
    """What is trained of a row, with m_t of §7.

    Raises:
        ValueError: a probe's hint is not that of the pool, or hint-free scores of it are missing.
    """
    is_policy = trajectory.origin == _POLICY
    mask = is_policy.copy()
    behavior, version = trajectory.behavior_logprob, trajectory.policy_version
    kept = np.arange(len(trajectory.token_ids))
    if trajectory.kind is Kind.PROBE:
        start, goes, end = hint_span(trajectory, hints=hints)
        if not train_prefix:
            mask[:start] = False
        if transfer == "hint_free":
            if trajectory.alternative_logprob is None or trajectory.score_version is None:
                raise ValueError("a probe without alternative_logprob cannot be trained with hint_free transfer")
            mask[start:goes] = True
            behavior, version = behavior.copy(), version.copy()
            behavior[end:] = trajectory.alternative_logprob[end:]
            version[end:] = trajectory.score_version
            kept = np.concatenate([kept[:goes], kept[end:]])
        elif train_hints:
            mask[start:end] = True
    trained = np.flatnonzero(mask[kept])
    source = kept[trained]
    return TrainedTokens(
        token_ids=trajectory.token_ids[kept],
        trained=trained,
        source=source,
        behavior_logprob=behavior[source],
        policy_version=version[source],
        is_policy=is_policy[source],
    )
