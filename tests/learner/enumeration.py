"""All rollouts of a toy process, with their probabilities: expectations of an estimator without sampling.

A question is the prompt token. A turn is written from the tokens 0, 1 and `ACT` until `ACT`, its action, or for four
tokens; the environment answers with a token; the second turn ends the episode. So a target has up to eight steps.
Failed targets are forked by the product's rule (`rexrag.env.branch`) at the start of a turn or after its first token,
with a pool of hints of which one begins another and one comes twice.

Two stale versions wrote the rows: tokens before a position that is drawn for the row are of version 0, the others of
version 1, and the learner is a third policy. Positions are those of the row that is trained.

    toy = Toy()
    rows = toy.rows(transfer="hinted")        # every target and every probe
    rows[0].probability                       # expected number of such rows per target

Legend: R rows, P parameters of the policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from rexrag.env.branch import branch_point
from rexrag.hints import HintPool
from rexrag.learner.branches import BranchPosition, BranchRates
from rexrag.learner.trained_tokens import Transfer
from rexrag.types import EndReason, Kind, Origin, Trajectory, Turn

ACT: Final = 2
ENV: Final = 3
PROMPT: Final = 4
NUM_TURNS: Final = 2
TURN_TOKENS: Final = 4
VOCABULARY: Final = 3
MAX_LENGTH: Final = 1 + NUM_TURNS * (TURN_TOKENS + 1) + 2
SWITCHES: Final = (2, 5)
"""Positions from which on a row is of version 1, equally likely."""

Tokens = tuple[int, ...]
Floats = npt.NDArray[np.float64]


class Policy:
    """Next-token probabilities that depend on the position and on the two tokens before it."""

    def __init__(self, logits: Floats) -> None:
        """
        Args:
            logits: [MAX_LENGTH, 5, 5, 3].
        """
        self.logits = logits
        shifted = logits - logits.max(axis=-1, keepdims=True)
        self.logprobs: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def logprob(self, context: Sequence[int], token: int) -> float:
        return float(self.logprobs[place(context)][token])


def place(context: Sequence[int]) -> tuple[int, int, int]:
    """Where the parameters stand for the token after `context`."""
    return len(context), context[-2] if len(context) > 1 else PROMPT, context[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class EnumeratedRow:
    """A row and how many of it a target brings on average.

    Attributes:
        prefix: tokens up to the branch, of a probe or of a target that can be forked; None: it cannot.
    """

    trajectory: Trajectory
    probability: float
    switch: int
    prefix: Tokens | None


class ExactRates(BranchRates):
    """φ as it is, given the switch that the row was written under."""

    def __init__(self, toy: Toy, switches: dict[Trajectory, int]) -> None:
        super().__init__()
        self._toy = toy
        self._switches = switches

    def phi(self, trajectory: Trajectory, at: BranchPosition) -> float:
        prefix = tuple(trajectory.token_ids[: at.position].tolist())
        return max(self._toy.phi[self._switches[trajectory]].get(prefix, 0.0), 1e-300)


class Toy:
    """The process, its three policies and its pool."""

    def __init__(self, *, spread: float = 0.3, probe_rate: float = 0.5) -> None:
        rng = np.random.default_rng(3)
        base = rng.normal(size=(MAX_LENGTH, 5, 5, VOCABULARY))
        base[..., ACT] += 0.5
        self.learner = Policy(base + spread * rng.normal(size=base.shape))
        self.versions = [Policy(base + spread * rng.normal(size=base.shape)) for _ in range(2)]
        self.probe_rate = probe_rate
        self.hints = HintPool([[0], [0, 1], [1, 0], [0]], kept=[0, 1, 0, 0])
        self._turns = [
            (*words, *end)
            for length in range(TURN_TOKENS + 1)
            for words in product((0, 1), repeat=length)
            for end in ([(ACT,)] if length < TURN_TOKENS else [()])
        ]

    def reward(self, tokens: Tokens) -> float:
        """1 for about a third of the rows: those whose words have one sum modulo 3 with their length."""
        words = [token for token in tokens if token < ACT]
        return float((sum(words) + len(words)) % 3 == 1)

    @cached_property
    def probability_of_right(self) -> float:
        """E[R] of the learner's policy without probes."""
        total = 0.0
        for tokens, _ in self.targets:
            written = [i for i, token in enumerate(tokens) if token < ENV]
            total += self.reward(tokens) * np.exp(sum(self.learner.logprob(tokens[:i], tokens[i]) for i in written))
        return float(total)

    @cached_property
    def phi(self) -> dict[int, dict[Tokens, float]]:
        """Switch -> tokens up to a position -> P(forked there and failed, given them)."""
        rates: dict[int, dict[Tokens, float]] = {}
        for switch in SWITCHES:
            forked: defaultdict[Tokens, float] = defaultdict(float)
            reached: defaultdict[Tokens, float] = defaultdict(float)
            for tokens, turns in self.targets:
                probability = np.exp(self._sampled(tokens, range(1, len(tokens)), switch).sum())
                at = self._fork(turns, len(tokens))
                for length in range(1, len(tokens) + 1):
                    reached[tokens[:length]] += probability
                if at is not None and self.reward(tokens) == 0.0:
                    forked[tokens[:at]] += probability
            rates[switch] = {prefix: value / reached[prefix] for prefix, value in forked.items()}
        return rates

    def rows(
        self, *, transfer: Transfer, score_by_path: bool = True, hint_in_limits: bool = False
    ) -> list[EnumeratedRow]:
        """Every target and probe. With `hint_free` a row comes once for each alternative that a target draws.

        Args:
            score_by_path: alternative scores of a token are of the version that wrote it; else all are of the row's
                last version, as an actor scores them.
            hint_in_limits: what goes of a hint counts towards the tokens of its turn; else a probe has as many left
                as a target. With `hinted` a hint is part of the row and always counts.
        """
        found = []
        for switch in SWITCHES:
            share = 1.0 / len(SWITCHES)
            for tokens, turns in self.targets:
                sampled = self._sampled(tokens, range(1, len(tokens)), switch)
                probability = share * float(np.exp(sampled.sum()))
                at = self._fork(turns, len(tokens))
                target = self._trajectory(tokens, turns, sampled, switch, branch=at)
                prefix = None if at is None else tokens[:at]
                if transfer == "hinted":
                    found.append(
                        EnumeratedRow(trajectory=target, probability=probability, switch=switch, prefix=prefix)
                    )
                else:
                    found += self._scored_targets(target, turns, probability, switch, prefix, score_by_path)
            found += self._probes(switch, share, transfer, score_by_path, hint_in_limits or transfer == "hinted")
        return found

    @cached_property
    def targets(self) -> list[tuple[Tokens, list[Turn]]]:
        return self._complete((PROMPT,), [])

    def _complete(
        self, tokens: Tokens, turns: list[Turn], *, turn_start: int | None = None
    ) -> list[tuple[Tokens, list[Turn]]]:
        """All ways to go on from the middle of a turn that began at `turn_start`, or from the start of one."""
        start = len(tokens) if turn_start is None else turn_start
        found = []
        for words in self._turns:
            written = tokens[start:]
            if words[: len(written)] != written:
                continue
            longer = (*tokens[:start], *words)
            has_action = words[-1] == ACT
            action = len(longer) - 1 if has_action else None
            turn = Turn(
                start=start, end=len(longer), action="search" if has_action else "malformed", action_start=action
            )
            if len(turns) + 1 == NUM_TURNS:
                found.append((longer, [*turns, turn]))
            else:
                found += self._complete((*longer, ENV), [*turns, turn])
        return found

    def _fork(self, turns: Sequence[Turn], length: int) -> int | None:
        return branch_point(
            turns,
            branch="answer",
            prompt_length=1,
            length=length,
            max_turns=NUM_TURNS - 1,
            max_turn_tokens=TURN_TOKENS,
            max_trajectory_tokens=100,
            longest_hint=self.hints.longest,
        )

    def _sampled(self, tokens: Tokens, positions: range, switch: int) -> Floats:
        """Log-probs of the tokens at `positions` under the versions that wrote them; 0 for the environment's."""
        return np.array(
            [
                0.0 if tokens[i] == ENV else self.versions[int(i >= switch)].logprob(tokens[:i], tokens[i])
                for i in positions
            ]
        )

    def _probes(
        self, switch: int, share: float, transfer: Transfer, score_by_path: bool, hint_in_limits: bool
    ) -> list[EnumeratedRow]:
        """Of every prefix that is forked: each hint, and all ways to go on."""
        parents: dict[Tokens, list[Turn]] = {}
        for tokens, turns in self.targets:
            at = self._fork(turns, len(tokens))
            if at is not None:
                parents.setdefault(tokens[:at], [turn for turn in turns if turn.end <= at])
        found = []
        for prefix, turns in parents.items():
            forked = share * self.probe_rate * self.phi[switch].get(prefix, 0.0)
            reached = self._sampled(prefix, range(1, len(prefix)), switch)
            for hint_id in range(len(self.hints)):
                for tokens, all_turns in self._continuations(prefix, turns, hint_id, hint_in_limits):
                    found.append(
                        self._probe(
                            prefix, hint_id, tokens, all_turns, reached, forked, switch, transfer, score_by_path
                        )
                    )
        return found

    def _continuations(
        self, prefix: Tokens, turns: Sequence[Turn], hint_id: int, hint_in_limits: bool
    ) -> list[tuple[Tokens, list[Turn]]]:
        """Whole rows with the hint in them."""
        hint, kept = self.hints.ids(hint_id), self.hints.kept(hint_id)
        start = prefix_turn_start(prefix)
        if hint_in_limits:
            return self._complete((*prefix, *hint), list(turns), turn_start=start)
        at, goes = len(prefix) + kept, hint[kept:]
        return [
            (
                (*free[:at], *goes, *free[at:]),
                [*turns, *(_shifted(turn, at, len(goes)) for turn in all_turns[len(turns) :])],
            )
            for free, all_turns in self._complete((*prefix, *hint[:kept]), list(turns), turn_start=start)
        ]

    def _probe(
        self, prefix: Tokens, hint_id: int, tokens: Tokens, turns: list[Turn], reached: Floats, forked: float,
        switch: int, transfer: Transfer, score_by_path: bool,
    ) -> EnumeratedRow:  # fmt: skip
        hint = self.hints.ids(hint_id)
        begin, end = len(prefix), len(prefix) + len(hint)
        goes = 0 if transfer == "hinted" else len(hint) - self.hints.kept(hint_id)
        # A token is of the version of its position in the row that is trained.
        after = self._sampled(tokens, range(end, len(tokens)), switch + goes)
        scores_of_hint = self._sampled(tokens, range(begin, end), switch)
        behavior = np.concatenate([reached, scores_of_hint, after])
        probability = forked * float(np.exp(reached.sum() + after.sum())) / len(self.hints)
        alternative = None
        if transfer == "hint_free":
            free = (*tokens[: end - goes], *tokens[end:])
            when = switch if score_by_path else 0
            scored = self._sampled(free, range(end - goes, len(free)), when)
            alternative = np.concatenate([np.zeros(end), scored])
        trajectory = self._trajectory(
            tokens, turns, behavior, switch, branch=begin, hint_id=hint_id, alternative=alternative
        )
        return EnumeratedRow(trajectory=trajectory, probability=probability, switch=switch, prefix=prefix)

    def _scored_targets(
        self, target: Trajectory, turns: Sequence[Turn], probability: float, switch: int, prefix: Tokens | None,
        score_by_path: bool,
    ) -> list[EnumeratedRow]:  # fmt: skip
        tokens: Tokens = tuple(target.token_ids.tolist())
        last = [turn.end if turn.action_start is None else turn.action_start for turn in turns]
        places = [at for turn, end in zip(turns, last, strict=True) for at in range(turn.start, end + 1)]
        found = []
        for at, hint_id in product(places, range(len(self.hints))):
            hint, kept = self.hints.ids(hint_id), self.hints.kept(hint_id)
            alternative = None
            if tokens[at : at + kept] == hint[:kept]:
                hinted = (*tokens[:at], *hint, *tokens[at + kept :])
                goes = len(hint) - kept
                when = switch + goes if score_by_path else 0
                scored = self._sampled(hinted, range(at + len(hint), len(hinted)), when)
                alternative = np.concatenate([np.zeros(at + kept), scored])
            row = self._trajectory(
                tokens, turns, target.behavior_logprob[1:], switch,
                branch=None if target.branch_point is None else 1 + target.branch_point,
                alternative=alternative, drawn=(at - 1, hint_id),
            )  # fmt: skip
            chance = probability / len(places) / len(self.hints)
            found.append(EnumeratedRow(trajectory=row, probability=chance, switch=switch, prefix=prefix))
        return found

    def _trajectory(
        self, tokens: Tokens, turns: Sequence[Turn], behavior: npt.NDArray[np.floating], switch: int, *,
        branch: int | None,
        hint_id: int | None = None, alternative: Floats | None = None, drawn: tuple[int, int] | None = None,
    ) -> Trajectory:  # fmt: skip
        origin = np.array([Origin.PROMPT if t == PROMPT else Origin.ENV if t == ENV else Origin.POLICY for t in tokens])
        if hint_id is not None:
            assert branch is not None
            origin[branch : branch + len(self.hints.ids(hint_id))] = Origin.HINT
        free = tuple(tokens)
        if hint_id is not None and alternative is not None:
            assert branch is not None
            end = branch + len(self.hints.ids(hint_id))
            free = (*tokens[: branch + self.hints.kept(hint_id)], *tokens[end:])
        reward = self.reward(free)
        return Trajectory(
            kind=Kind.TARGET if hint_id is None else Kind.PROBE,
            parent=None if hint_id is None else 0,
            branch_point=None if branch is None else branch - 1,
            hint_id=hint_id,
            reward=reward,
            em=reward,
            f1=reward,
            correct=reward > 0,
            end_reason=EndReason.TURNS,
            num_searches=0,
            num_malformed=0,
            gold_retrieved=None,
            prompt_length=1,
            token_ids=np.array(tokens, np.int32),
            origin=origin.astype(np.uint8),
            behavior_logprob=np.concatenate([[0.0], behavior]),
            policy_version=(np.arange(len(tokens)) >= switch).astype(np.int32),
            action_starts=np.array([t.end if t.action_start is None else t.action_start for t in turns], np.int32),
            alternative_logprob=alternative,  # type: ignore[arg-type]
            alternative_branch=None if drawn is None else drawn[0],
            alternative_hint_id=None if drawn is None else drawn[1],
            score_version=None if alternative is None else 1,
        )


def _shifted(turn: Turn, at: int, by: int) -> Turn:
    """A turn in a row that has `by` tokens more from `at` on."""
    start = turn.start + by if turn.start > at else turn.start
    action_start = None if turn.action_start is None else turn.action_start + by
    return Turn(start=start, end=turn.end + by, action=turn.action, action_start=action_start)


def prefix_turn_start(prefix: Tokens) -> int:
    """First token of the turn that `prefix` is in."""
    return max(i for i, token in enumerate(prefix) if token in (PROMPT, ENV)) + 1
