"""Estimates of the toy process's gradient by the learner's own weigher, views and objective, exact in expectation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from enumerated_gradient import Moments, ScoredTokens, on_policy
from enumerated_groups import GroupRows, expected_shares
from enumeration import ENV, EnumeratedRow, ExactRates, Tokens, Toy
from plain_settings import correction_settings, loss_settings, probe_settings

from rexrag.learner.advantage import Baseline, group_advantages
from rexrag.learner.branches import BranchPosition, BranchRates, branch_places, place_of
from rexrag.learner.correction import CorrectionSettings, Mixture
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import MixtureWeigher
from rexrag.learner.objective import Objective
from rexrag.learner.prepared_step import PreparedRow
from rexrag.learner.probe_filter import hint_score
from rexrag.learner.trained_tokens import Transfer
from rexrag.types import Kind, Trajectory

NUM_FAMILIES = 3
MIDDLE = 0.4

Share = Callable[[EnumeratedRow], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An estimator: what differs from the exact one.

    Attributes:
        group_size: targets of a group, with `normalized`.
        stale: with `normalized`, whether a token has a weight of its own for staleness, or the row's share has it.
        likelihood: the advantages of `normalized` with all weights equal, so that others may weight the tokens.
    """

    name: str
    transfer: Transfer = "hinted"
    mixture: Mixture = "sequence"
    cap: float | None = None
    phi: str = "exact"
    keep_hints_above: float | None = None
    baseline: Baseline | None = None
    count_rows: bool = False
    train_hints: bool = True
    train_prefix: bool = True
    score_by_path: bool = True
    hint_in_limits: bool = False
    group_size: int = 2
    stale: Literal["token", "share"] = "share"
    likelihood: bool = False

    @property
    def is_likelihood(self) -> bool:
        return self.likelihood or self.mixture == "normalized"


class World:
    """The toy with its rows, made once, and the gradient that is wanted."""

    def __init__(self) -> None:
        self.toy = Toy()
        self.exact = on_policy(self.toy, lambda reward: reward - MIDDLE)
        self.weighers: dict[object, MixtureWeigher] = {}
        """By all that a weight of a whole trajectory depends on."""
        self._scored: dict[tuple[Trajectory, int, bytes], ScoredTokens] = {}
        self._rows: dict[tuple[Transfer, bool, bool], list[EnumeratedRow]] = {}

    def rows(self, case: Case) -> list[EnumeratedRow]:
        key = (case.transfer, case.score_by_path, case.hint_in_limits)
        if key not in self._rows:
            self._rows[key] = self.toy.rows(
                transfer=case.transfer, score_by_path=case.score_by_path, hint_in_limits=case.hint_in_limits
            )
        return self._rows[key]

    def scored(self, row: PreparedRow) -> ScoredTokens:
        trained = row.tokens.trained
        key = (row.trajectory, len(row.tokens.token_ids), trained.tobytes())
        if key not in self._scored:
            self._scored[key] = ScoredTokens.of(tuple(row.tokens.token_ids.tolist()), trained.tolist())
        return self._scored[key]

    def relative(self, moments: Moments) -> tuple[float, float, float]:
        """Bias and deviation over the length of the exact gradient, and the cosine with it."""
        size = float(np.linalg.norm(self.exact.mean))
        bias = float(np.linalg.norm(moments.mean - self.exact.mean)) / size
        cosine = float(moments.mean @ self.exact.mean) / size / float(np.linalg.norm(moments.mean))
        return bias, cosine, moments.deviation / size


def estimate(world: World, case: Case) -> Moments:
    """The learner's gradient per target, by its own weigher, views and objective."""
    toy = world.toy
    rows = world.rows(case)
    if case.keep_hints_above is not None:
        scores = [hint_score(row.trajectory) for row in rows if row.trajectory.kind is Kind.PROBE]
        least = float(np.quantile(scores, case.keep_hints_above))
        rows = [r for r in rows if r.trajectory.kind is Kind.TARGET or hint_score(r.trajectory) >= least]
    correction = correction_settings(
        mixture=case.mixture,
        bound="none" if case.cap is None else "truncate",
        cap=case.cap or 2.0,
    )
    num_probes = sum(row.probability for row in rows if row.trajectory.kind is Kind.PROBE)
    weigher = weigher_of(world, case, rows, correction, num_probes=num_probes)
    share = likelihood_shares(world, rows, case, weigher) if case.is_likelihood else shares(toy, rows, case)
    loss = loss_settings(train_hints=case.train_hints, train_prefix=case.train_prefix)
    prepared = [prepare(row, weigher, loss, advantage=share(row)) for row in rows]
    pairs = [(row, one) for row, one in zip(rows, prepared, strict=True) if len(one.tokens.trained)]
    tokens = [world.scored(one) for _, one in pairs]
    scored = ScoredTokens.join(tokens)
    logprob = torch.tensor(scored.logprobs(toy.learner), requires_grad=True)
    objective = Objective(
        [one for _, one in pairs],
        denominator=denominator_of(toy, case, num_probes=num_probes),
        version=1,
        correction=correction,
        loss=loss,
        reference_logprob=None,
        proximal_logprob=proximal_of(case, pairs, logprob),
        device=torch.device("cpu"),
    )
    objective.chunk_loss(logprob, torch.zeros_like(logprob), slice(0, len(logprob))).backward()  # type: ignore[no-untyped-call]
    assert logprob.grad is not None
    factors = -logprob.grad.numpy()
    chance = np.concatenate([np.full(len(t.token), row.probability) for (row, _), t in zip(pairs, tokens, strict=True)])
    norms = scored.squared_norms(toy.learner)
    return Moments(mean=scored.gradient(toy.learner, factors), second=float((factors**2 / chance * norms).sum()))


def denominator_of(toy: Toy, case: Case, *, num_probes: float) -> float:
    if case.is_likelihood or case.count_rows:
        return 1.0
    return 1.0 + (toy.probe_rate if case.mixture == "sequence" else num_probes)


def proximal_of(
    case: Case, pairs: Sequence[tuple[EnumeratedRow, PreparedRow]], logprob: torch.Tensor
) -> torch.Tensor | None:
    """Where staleness is a row's: under which policy; that which wrote it, where its share has it already."""
    if case.mixture == "normalized" and case.stale == "share":
        return torch.from_numpy(np.concatenate([one.tokens.behavior_logprob for _, one in pairs]))
    return logprob.detach() if case.mixture == "sequence" else None


def likelihood_shares(world: World, rows: Sequence[EnumeratedRow], case: Case, weigher: MixtureWeigher) -> Share:
    """E[number of the row · A]/n in groups of `case.group_size` targets."""
    toy = world.toy
    log_weight = np.zeros(len(rows))
    if case.mixture == "normalized":
        log_weight += [weigher.log_weight(row.trajectory) for row in rows]
    if case.stale == "share":
        log_weight += [log_staleness(toy, row) for row in rows]
    places: dict[tuple[Tokens, int], int] = {}
    place = [
        -1
        if row.prefix is None or (row.trajectory.kind is Kind.TARGET and row.trajectory.correct)
        else places.setdefault((row.prefix, row.switch), len(places))
        for row in rows
    ]
    found = expected_shares(
        GroupRows(
            probability=np.array([row.probability for row in rows]),
            reward=np.array([row.trajectory.reward for row in rows]),
            weight=np.exp(log_weight),
            is_probe=np.array([row.trajectory.kind is Kind.PROBE for row in rows]),
            place=np.array(place),
            probe_rate=toy.probe_rate,
        ),
        num_targets=case.group_size,
    )
    by_row = dict(zip(map(id, rows), found.tolist(), strict=True))
    return lambda row: by_row[id(row)]


def log_staleness(toy: Toy, row: EnumeratedRow) -> float:
    """Log π_prox/π_v of the whole row as it is trained, hinted."""
    tokens = tuple(row.trajectory.token_ids.tolist())
    written = [i for i, token in enumerate(tokens) if token < ENV]
    scored = ScoredTokens.of(tokens, written)
    return float(scored.logprobs(toy.learner).sum() - row.trajectory.behavior_logprob[written].sum())


def weigher_of(
    world: World, case: Case, rows: Sequence[EnumeratedRow], correction: CorrectionSettings, *, num_probes: float
) -> MixtureWeigher:
    toy = world.toy
    probe = probe_settings(rate=toy.probe_rate, transfer=case.transfer, filter="none")
    weigher = MixtureWeigher(correction=correction, probe=probe, hints=toy.hints, num_probes=1, num_targets=1)
    if not correction.weighs_trajectories:
        weigher.alpha = num_probes / (1.0 + num_probes)
        return weigher
    key = (case.mixture, case.transfer, case.score_by_path, case.hint_in_limits, case.phi, case.keep_hints_above)
    if key in world.weighers:
        return world.weighers[key]
    rates: BranchRates = One()
    if case.phi == "exact":
        rates = ExactRates(toy, {row.trajectory: row.switch for row in rows})
    elif case.phi == "estimated":
        rates = counted(world.rows(Case(name="targets")))
    weigher.weigh_sequences([row.trajectory for row in rows], rates)
    world.weighers[key] = weigher
    return weigher


class One(BranchRates):
    def phi(self, trajectory: Trajectory, at: BranchPosition) -> float:
        return 1.0


def counted(rows: Sequence[EnumeratedRow]) -> BranchRates:
    """What the learner's counts tend to with many targets."""
    counts: dict[tuple[int, int], tuple[float, float]] = {}
    for row in rows:
        target = row.trajectory
        if target.kind is Kind.PROBE:
            continue
        fork = None if target.branch_point is None or target.correct else 1 + target.branch_point
        for position, turn in zip(*branch_places(target, branch="answer"), strict=True):
            at = BranchPosition(int(position), int(turn))
            seen, forked = counts.get(place_of(target, at), (0.0, 0.0))
            many = 1e9 * row.probability
            counts[place_of(target, at)] = (seen + many, forked + many * (at.position == fork))
    return BranchRates.of_table((turn, token, *entry) for (turn, token), entry in counts.items())


def prepare(row: EnumeratedRow, weigher: MixtureWeigher, loss: LossSettings, *, advantage: float) -> PreparedRow:
    tokens = weigher.tokens_of(row.trajectory, loss)
    return PreparedRow(
        trajectory=row.trajectory,
        tokens=tokens,
        group=0,
        row=0,
        hops=None,
        advantage=advantage,
        mixture_weight=weigher.weights(row.trajectory, tokens),
        log_mixture=0.0,
    )


def shares(toy: Toy, rows: Sequence[EnumeratedRow], case: Case) -> Share:
    """Expected number of a row times its advantage (over the rows of its step, where they are counted)."""
    if case.baseline is None and not case.count_rows:
        return lambda row: row.probability * (row.trajectory.reward - MIDDLE)
    families = Families(toy, rows)

    def share(row: EnumeratedRow) -> float:
        trajectory = row.trajectory
        if trajectory.kind is Kind.PROBE:
            types = {"probe right" if trajectory.correct else "probe wrong": 1.0}
        else:
            types = {"right": 1.0} if trajectory.correct else families.after_failure(row)
        return row.probability * families.factor(trajectory.kind, types, case)

    return share


class Families:
    """What an advantage depends on beside its own row: how the targets of the group ended, and their probes."""

    ROWS: ClassVar[dict[str, list[tuple[float, bool]]]] = {
        "right": [(1.0, False)],
        "alone": [(0.0, False)],
        "probe wrong": [(0.0, False), (0.0, True)],
        "probe right": [(0.0, False), (1.0, True)],
    }
    """Type of a family -> (reward, is a probe) of its rows."""

    def __init__(self, toy: Toy, rows: Sequence[EnumeratedRow]) -> None:
        self._rate = toy.probe_rate
        right = sum(r.probability for r in rows if r.trajectory.kind is Kind.TARGET and r.trajectory.correct)
        probes = [row for row in rows if row.trajectory.kind is Kind.PROBE]
        rescued = sum(row.probability for row in probes if row.trajectory.correct)
        lost = sum(row.probability for row in probes) - rescued
        self._chances = {
            "right": right, "alone": 1.0 - right - rescued - lost, "probe wrong": lost, "probe right": rescued,
        }  # fmt: skip
        sums: dict[tuple[Tokens | None, int], list[float]] = {}
        for row in probes:
            total = sums.setdefault((row.prefix, row.switch), [0.0, 0.0])
            total[0] += row.probability
            total[1] += row.probability * row.trajectory.correct
        self._success = {key: good / total for key, (total, good) in sums.items()}
        self._factors: dict[tuple[Kind, str], float] = {}

    def after_failure(self, row: EnumeratedRow) -> dict[str, float]:
        """How likely the family of a failed target is of each type."""
        if row.prefix is None:
            return {"alone": 1.0}
        good = self._rate * self._success[row.prefix, row.switch]
        return {"alone": 1.0 - self._rate, "probe right": good, "probe wrong": self._rate - good}

    def factor(self, kind: Kind, types: dict[str, float], case: Case) -> float:
        """Expected advantage of the row of a kind over its family's types and those of the other families."""
        return sum(chance * self._factor(kind, own, case) for own, chance in types.items())

    def _factor(self, kind: Kind, own: str, case: Case) -> float:
        if (kind, own) not in self._factors:
            others = itertools.product(self._chances, repeat=NUM_FAMILIES - 1)
            self._factors[kind, own] = sum(
                math.prod(self._chances[name] for name in combination) * self._value(kind, (own, *combination), case)
                for combination in others
            )
        return self._factors[kind, own]

    def _value(self, kind: Kind, families: Sequence[str], case: Case) -> float:
        rows = [(i, *row) for i, name in enumerate(families) for row in self.ROWS[name]]
        at = 0 if kind is Kind.TARGET else 1
        if case.count_rows:
            return (rows[at][1] - MIDDLE) * NUM_FAMILIES / len(rows)
        assert case.baseline is not None
        advantages = group_advantages(
            np.array([reward for _, reward, _ in rows]),
            is_probe=np.array([probe for _, _, probe in rows]),
            family=[family for family, _, _ in rows],
            baseline=case.baseline,
        )
        return float(advantages[at])
