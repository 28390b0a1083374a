"""A trajectory while it is being written: grows by turns, ends as a frozen `Trajectory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rexrag.actors.scoring import Scores
from rexrag.engine.protocol import Generation
from rexrag.types import EndReason, FloatArray, Kind, Origin, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A finished rollout scored for hint-free transfer (§5b).

    Attributes:
        branch, hint_id: drawn for a target; None for a probe, which has its own.
        start: first token that was scored; scores: log-probs of the tokens from there on, None where there are none.
    """

    branch: int | None = None
    hint_id: int | None = None
    start: int = 0
    scores: Sequence[float] | None = None
    version: int | None = None

    def logprobs(self, origin: Sequence[int]) -> FloatArray | None:
        """[T] the scores in their places, 0 before them and on tokens without a density."""
        if self.scores is None:
            return None
        placed = np.zeros(len(origin), np.float32)
        placed[self.start :] = self.scores
        placed[~np.isin(origin, (Origin.POLICY, Origin.HINT))] = 0.0
        return placed


@dataclass(kw_only=True)
class Draft:
    """Tokens with their origin, behaviour log-prob and version, in the order in which they were produced.

    `turn_start` is the first token of the turn that is being written; `gold_hits` says per answered search
    whether it showed something gold, None where that cannot be known; `failure` why the retriever gave no result.
    """

    kind: Kind
    token_ids: list[int]
    origin: list[int]
    logprobs: list[float]
    versions: list[int]
    prompt_length: int
    turn_start: int
    turns: list[Turn] = field(default_factory=list)
    num_searches: int = 0
    num_malformed: int = 0
    num_refused: int = 0
    failure: str | None = None
    answer: str | None = None
    gold_hits: list[bool] | None = None
    parent: int | None = None
    branch_point: int | None = None
    hint_id: int | None = None
    alternative: Alternative | None = None
    generate_s: float = 0.0
    search_s: float = 0.0

    @classmethod
    def start(cls, prompt_ids: Sequence[int], *, version: int) -> Draft:
        """A target that has its prompt and nothing else."""
        length = len(prompt_ids)
        return cls(
            kind=Kind.TARGET,
            token_ids=list(prompt_ids),
            origin=[Origin.PROMPT] * length,
            logprobs=[0.0] * length,
            versions=[version] * length,
            prompt_length=length,
            turn_start=length,
        )

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def action_starts(self) -> list[int]:
        """Of each turn the first token of its action, its end where it has none."""
        return [turn.end if turn.action_start is None else turn.action_start for turn in self.turns]

    def fork(self, *, at: int, parent: int, hint_id: int) -> Draft:
        """A probe that keeps the tokens before `at`, with their recorded log-probs; its hint comes next."""
        turns = [turn for turn in self.turns if turn.end <= at]
        forked = self.turns[len(turns)]
        assert forked.start <= at < forked.end, "a branch point lies inside a turn"
        num_malformed, num_refused = (sum(turn.action == kind for turn in turns) for kind in ("malformed", "refused"))
        num_searches = len(turns) - num_malformed - num_refused
        return Draft(
            kind=Kind.PROBE,
            token_ids=self.token_ids[:at],
            origin=self.origin[:at],
            logprobs=self.logprobs[:at],
            versions=self.versions[:at],
            prompt_length=self.prompt_length,
            turn_start=forked.start,
            turns=turns,
            num_searches=num_searches,
            num_malformed=num_malformed,
            num_refused=num_refused,
            gold_hits=None if self.gold_hits is None else self.gold_hits[:num_searches],
            parent=parent,
            branch_point=at - self.prompt_length,
            hint_id=hint_id,
        )

    def add_hint(self, hint: Sequence[int], *, scores: Sequence[float], versions: Sequence[int]) -> None:
        """Append the inserted hint with the engine's scores of it (§3)."""
        self._append(hint, Origin.HINT, scores, versions)

    def add_policy(self, generation: Generation) -> None:
        self._append(generation.token_ids, Origin.POLICY, generation.logprobs, generation.versions)

    def add_env(self, ids: Sequence[int], *, version: int) -> None:
        """Append an observation or feedback; the next turn starts after it."""
        self._append(ids, Origin.ENV, [0.0] * len(ids), [version] * len(ids))
        self.turn_start = self.length

    def policy_positions(self) -> list[int]:
        """Positions of this turn's policy tokens: the only ones that are parsed for actions."""
        return [i for i in range(self.turn_start, self.length) if self.origin[i] == Origin.POLICY]

    def cut(self, length: int) -> None:
        """Drop what the model wrote after its action: it does not exist."""
        for column in (self.token_ids, self.origin, self.logprobs, self.versions):
            del column[length:]

    def finish(self, end_reason: EndReason, *, scores: Scores, text: str | None) -> Trajectory:
        alternative = self.alternative or Alternative()
        return Trajectory(
            kind=self.kind,
            parent=self.parent,
            branch_point=self.branch_point,
            hint_id=self.hint_id,
            reward=scores.reward,
            em=scores.em,
            f1=scores.f1,
            correct=scores.correct,
            end_reason=end_reason,
            num_searches=self.num_searches,
            num_malformed=self.num_malformed,
            num_refused=self.num_refused,
            gold_retrieved=None if self.gold_hits is None else any(self.gold_hits),
            prompt_length=self.prompt_length,
            token_ids=np.asarray(self.token_ids, np.int32),
            origin=np.asarray(self.origin, np.uint8),
            behavior_logprob=np.asarray(self.logprobs, np.float32),
            policy_version=np.asarray(self.versions, np.int32),
            action_starts=np.asarray(self.action_starts, np.int32),
            alternative_logprob=alternative.logprobs(self.origin),
            alternative_branch=alternative.branch,
            alternative_hint_id=alternative.hint_id,
            score_version=alternative.version,
            text=text,
            generate_s=self.generate_s,
            search_s=self.search_s,
        )

    def _append(self, ids: Sequence[int], origin: Origin, logprobs: Sequence[float], versions: Sequence[int]) -> None:
        assert len(ids) == len(logprobs) == len(versions), "per-token columns have one length"
        self.token_ids.extend(ids)
        self.origin.extend([int(origin)] * len(ids))
        self.logprobs.extend(logprobs)
        self.versions.extend(versions)
