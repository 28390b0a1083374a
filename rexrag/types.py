"""All data that crosses a module boundary.

    Question -> Turn -> Trajectory -> TrajectoryGroup -> (Arrow) -> learner -> StepResult

Legend: T tokens of a trajectory, prompt included. Log-probs are natural, float32.
Values are validated where they are made, so that no reader of these types checks them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property
from importlib import import_module
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

    GROUP_SCHEMA: pa.Schema


def __getattr__(name: str) -> object:
    """`GROUP_SCHEMA`, which users import from here too; what makes it needs these types."""
    if name == "GROUP_SCHEMA":
        return import_module("rexrag.arrow").GROUP_SCHEMA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


IntArray: TypeAlias = npt.NDArray[np.int32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


class Origin(IntEnum):
    """Who wrote a token (algorithm §1). Only `POLICY` and `HINT` tokens carry a density."""

    PROMPT = 0
    POLICY = 1
    HINT = 2
    ENV = 3


_POLICY, _HINT = int(Origin.POLICY), int(Origin.HINT)


class Kind(StrEnum):
    """A target is a plain rollout; a probe goes on from a failed one after an exploration hint (§2)."""

    TARGET = "target"
    PROBE = "probe"


class EndReason(StrEnum):
    """Why a trajectory ended. `ENV_ERROR` rows are masked: they count nowhere (§7)."""

    ANSWER = "answer"
    TURNS = "turns"
    LENGTH = "length"
    ENV_ERROR = "env_error"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its gold answers. `key` identifies it in a run: source and id, never a row index."""

    id: str
    data_source: str
    question: str
    golden_answers: tuple[str, ...]
    hops: int | None = None
    gold_passage_ids: tuple[str, ...] | None = None
    row: Mapping[str, object] = field(default_factory=dict)
    """The row as it stood in the file, for a user's own reward function; empty where none is set."""

    @property
    def key(self) -> str:
        return f"{self.data_source}/{self.id}"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One retrieved passage. `text` is data and is neutralised before it is ever tokenised."""

    id: str
    title: str
    text: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One model turn: tokens [start, end) of the trajectory, hint tokens at its head included.

    `action_start` is the first token that contains a character of the action's opening tag, None where the
    turn has no complete action.
    """

    start: int
    end: int
    action: str
    action_start: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One finished rollout, as token ids from the engine: nothing is ever decoded and re-encoded.

    Attributes:
        parent: row index within the group of the target that a probe forked from; None for targets.
        branch_point: tokens after the prompt that precede the branch. For a probe, where it forked; for a
            target, where §2 would fork it had it failed (right ones too), None where it could not be.
        hint_id: index into the run's hint pool; None for targets.
        reward, em, f1: scores of the answer in the policy's own tokens.
        correct: §2, em = 1 (f1 > 0 where the reward is `f1`).
        num_searches: searches that were answered; num_refused: those whose query the retriever did not take;
            num_malformed: turns without a complete action.
        gold_retrieved: a gold passage (or a gold answer in a shown passage) was retrieved; None if unknown.
        token_ids, origin, behavior_logprob, policy_version: [T], recorded at production time (§3).
            `behavior_logprob` is 0 and `policy_version` the version held on prompt and env tokens.
        action_starts: [num_turns] of each model turn the position of its action's first token, the turn's end where
            it has no action: the last position of the turn at which a probe can fork (§4).
        alternative_logprob: [T] recorded for hint-free transfer, 0 where there is none (§5b). Of a probe: log-probs
            after its hint as if the part of the hint that goes were not there. Of a target: log-probs from
            `alternative_branch` on as if hint `alternative_hint_id` stood there. None: not recorded, or the target
            could not have come from such a probe.
        alternative_branch: tokens after the prompt that precede the branch drawn for a target.
        score_version: version under which `alternative_logprob` was scored.
        generate_s, search_s: seconds that it waited for the engine and for the retriever.
    """

    kind: Kind
    parent: int | None
    branch_point: int | None
    hint_id: int | None
    reward: float
    em: float
    f1: float
    correct: bool
    end_reason: EndReason
    num_searches: int
    num_malformed: int
    num_refused: int = 0
    gold_retrieved: bool | None
    prompt_length: int
    token_ids: IntArray
    origin: ByteArray
    behavior_logprob: FloatArray
    policy_version: IntArray
    action_starts: IntArray
    alternative_logprob: FloatArray | None = None
    alternative_branch: int | None = None
    alternative_hint_id: int | None = None
    score_version: int | None = None
    text: str | None = None
    generate_s: float = 0.0
    search_s: float = 0.0

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in ("origin", "behavior_logprob", "policy_version"):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, token_ids has {length}")
        if not 0 < self.prompt_length <= length:
            raise ValueError(f"prompt_length {self.prompt_length} is outside [1, {length}]")
        is_prompt = self.origin == Origin.PROMPT
        if not is_prompt[: self.prompt_length].all() or is_prompt[self.prompt_length :].any():
            raise ValueError(f"origin must be PROMPT on exactly the first {self.prompt_length} tokens")
        if length and int(self.origin.max()) > max(Origin):
            raise ValueError(f"origin {int(self.origin.max())} is unknown, at most {int(max(Origin))}")
        density = self.has_density
        if not np.isfinite(self.behavior_logprob[density]).all():
            raise ValueError("behavior_logprob must be finite on policy and hint tokens")
        if (self.behavior_logprob[~density] != 0).any():
            raise ValueError("behavior_logprob must be 0 on prompt and env tokens")
        if (np.diff(self.policy_version[density]) < 0).any():
            raise ValueError("policy_version must not decrease along a trajectory")
        is_probe = self.kind is Kind.PROBE
        if is_probe and None in (self.parent, self.branch_point, self.hint_id):
            raise ValueError("a probe needs parent, branch_point and hint_id")
        if not is_probe and (self.parent is not None or self.hint_id is not None):
            raise ValueError("a target has neither parent nor hint_id")
        for name in ("branch_point", "alternative_branch"):
            at = getattr(self, name)
            if at is not None and not 0 <= at <= length - self.prompt_length:
                raise ValueError(f"{name} {at} is outside [0, {length - self.prompt_length}]")
        self._check_turns()
        self._check_alternative()

    def _check_turns(self) -> None:
        starts = self.turn_starts
        if len(self.action_starts) != len(starts):
            raise ValueError(
                f"action_starts has {len(self.action_starts)} entries, the tokens have {len(starts)} turns"
            )
        ends = np.append(starts[1:], len(self.token_ids))
        if ((self.action_starts < starts) | (self.action_starts > ends)).any():
            raise ValueError("action_starts must lie within their turns")

    def _check_alternative(self) -> None:
        scores = self.alternative_logprob
        if (self.alternative_branch is None) != (self.alternative_hint_id is None):
            raise ValueError("alternative_branch and alternative_hint_id belong together")
        if self.kind is Kind.PROBE and self.alternative_branch is not None:
            raise ValueError("a probe draws no alternative branch: it has its own")
        if (scores is None) != (self.score_version is None):
            raise ValueError("alternative_logprob and score_version belong together")
        if scores is not None and (len(scores) != len(self.token_ids) or not np.isfinite(scores).all()):
            raise ValueError(f"alternative_logprob must be finite, one entry for each of {len(self.token_ids)} tokens")

    @property
    def num_turns(self) -> int:
        """Model turns."""
        return len(self.action_starts)

    @cached_property
    def turn_starts(self) -> IntArray:
        """[num_turns] first token of each model turn: one with a density after one without."""
        begins = np.diff(self.has_density.astype(np.int8)) == 1
        return (np.flatnonzero(begins) + 1).astype(np.int32)

    @cached_property
    def has_density(self) -> BoolArray:
        """[T] True on policy and hint tokens; read-only."""
        mask: BoolArray = (self.origin == _POLICY) | (self.origin == _HINT)
        mask.flags.writeable = False
        return mask

    @property
    def is_masked(self) -> bool:
        return self.end_reason is EndReason.ENV_ERROR

    @property
    def min_version(self) -> int | None:
        versions = self.policy_version[self.has_density]
        return int(versions.min()) if len(versions) else None

    @property
    def max_version(self) -> int | None:
        versions = [*self.policy_version[self.has_density], self.score_version]
        return max((int(version) for version in versions if version is not None), default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectoryGroup:
    """The target rollouts of one question together with the probes they spawned.

    It is the unit of the buffer, of staleness, and of the advantage's baseline. Rows keep the order in which
    they were admitted; a probe's `parent` is its target's row index.
    """

    group_id: str
    question_id: str
    data_source: str
    hops: int | None
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"group {self.group_id} has no trajectory")
        for row, trajectory in enumerate(self.trajectories):
            if trajectory.parent is None:
                continue
            if not 0 <= trajectory.parent < len(self.trajectories):
                raise ValueError(
                    f"row {row} of group {self.group_id} has parent {trajectory.parent}, outside the group"
                )
            if self.trajectories[trajectory.parent].kind is not Kind.TARGET:
                raise ValueError(f"row {row} of group {self.group_id} has a parent that is not a target")

    @property
    def min_version(self) -> int | None:
        versions = [v for t in self.trajectories if (v := t.min_version) is not None]
        return min(versions, default=None)

    @property
    def max_version(self) -> int | None:
        versions = [v for t in self.trajectories if (v := t.max_version) is not None]
        return max(versions, default=None)

    @property
    def is_flat(self) -> bool:
        """Whether its rows, masked ones left out, have equal rewards: nothing can be learnt from it."""
        return len({row.reward for row in self.trajectories if not row.is_masked}) < 2


@dataclass(frozen=True, kw_only=True, order=True)
class WeightVersion:
    """A published version of the weights: learner steps finished, within one incarnation of the run.

    Actors fetch again when the incarnation changes; age is the difference of steps.
    """

    incarnation: str
    step: int


AppendOutcome: TypeAlias = Literal["accepted", "duplicate", "flat", "invalid"]
"""What became of an appended group: stored, there already, or dropped (equal rewards, or not what was leased)."""


class LeaseKey(NamedTuple):
    """Which lease: a group whose lease has ended is granted again, perhaps to the same actor."""

    group_id: str
    grant: int


@dataclass(frozen=True, kw_only=True)
class GroupLease:
    """One group that an actor may produce, with all that its draws are seeded by.

    The seed of a draw is a hash of (run seed, epoch, question, attempt, rollout, turn, what is drawn), never
    of an id of this process. `grant` counts the leases of the group, this one included.
    """

    group_id: str
    question: Question
    epoch: int
    attempt: int
    version: WeightVersion
    grant: int = 1

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(self.group_id, self.grant)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The groups of a learner step, in order of admission, as Arrow IPC streams. The filter of §8 is over them all."""

    step: int
    incarnation: str
    groups: tuple[bytes | PickleBuffer, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trace to read. `rescued`: a probe that is right where every target of its group is wrong."""

    tag: str
    text: str
    rescued: bool
    fields: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one learner step did. `metrics` has no NaN: a metric without a value is None.

    `applied`: not skipped on a non-finite loss or gradient. `updated`: a row had an advantage, the weights changed.
    """

    step: int
    applied: bool
    metrics: Mapping[str, float | None]
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    updated: bool = True


@dataclass(frozen=True, kw_only=True)
class FleetReport:
    """How the actors do, since the last report. `tokens_per_s`: of all together."""

    num_ready: int
    num_wanted: int
    num_replaced: int
    tokens_per_s: float
    canary_kl: float | None
    switch_s: float | None
    proof_s: float | None
    num_unproven: int


@dataclass(frozen=True, kw_only=True)
class EpisodeScore:
    """One evaluated question: what `eval.jsonl` is made of."""

    question_id: str
    data_source: str
    hops: int | None
    version: WeightVersion
    em: float
    f1: float
    num_searches: int
    num_turns: int
    num_malformed: int
    num_tokens: int
    num_refused: int = 0
    gold_retrieved: bool | None
    end_reason: EndReason
    text: str | None = None
