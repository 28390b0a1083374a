"""Exact weights of whole trajectories, in a mixture of targets and probes (§5, §5b).

With α = p/(1 + p) a step's rows have the density q = (1 − α)·π_v + α·μ per (1 + p)·targets rows, and w = π_v/q.
Legend: N rows, D decompositions of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rexrag.env.branch import Branch
from rexrag.hints import HintPool
from rexrag.learner.branches import BranchPosition, BranchRates, branch_places, decompositions
from rexrag.learner.correction import mixture_logprob, sequence_probe_logprob
from rexrag.learner.trained_tokens import Transfer, hint_span
from rexrag.types import FloatArray, Kind, Trajectory


def sequence_log_weights(
    rows: Sequence[Trajectory],
    *,
    probe_rate: float,
    hints: HintPool,
    branch: Branch,
    transfer: Transfer,
    rates: BranchRates,
) -> Tensor:
    """[N] log w_mix, float64, at most −log(1 − α); −∞ of a probe whose branch is none of the finished row's own.

    Args:
        probe_rate: p, at which dead ends are probed.
        rates: φ.

    Raises:
        ValueError: p is outside [0, 1], or a row was not recorded for the transfer.
    """
    if not 0.0 <= probe_rate <= 1.0:
        raise ValueError(f"probe_rate is {probe_rate}, it must be in [0, 1]")
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    alpha = probe_rate / (1.0 + probe_rate)
    if alpha == 0.0:
        return torch.zeros(len(rows), dtype=torch.float64)
    if transfer == "hint_free":
        log_ratios = [_hint_free_log_ratio(row, hints=hints, branch=branch, rates=rates) for row in rows]
        log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
        by_probes_alone = torch.isposinf(log_ratio)
        log_ratio = log_ratio.masked_fill(by_probes_alone, 0.0)
        weights = -mixture_logprob(torch.zeros_like(log_ratio), log_ratio, alpha)
        return weights.masked_fill(by_probes_alone, -math.inf)
    behavior = torch.from_numpy(np.concatenate([row.behavior_logprob for row in rows])).double()
    offsets = torch.tensor(np.cumsum([0, *(len(row.token_ids) for row in rows)]))
    found = [(n, d) for n, row in enumerate(rows) for d in decompositions(row, hints=hints, branch=branch)]
    log_mu = sequence_probe_logprob(
        behavior,
        offsets,
        row=torch.tensor([n for n, _ in found], dtype=torch.int64),
        start=torch.tensor([d.at.position for _, d in found], dtype=torch.int64),
        length=torch.tensor([len(hints.ids(d.hint_id)) for _, d in found], dtype=torch.int64),
        log_pmf=torch.tensor([hints.log_probability(d.hint_id) for _, d in found], dtype=torch.float64),
        log_phi=torch.tensor([math.log(rates.phi(rows[n], d.at)) for n, d in found], dtype=torch.float64),
    )
    total = torch.zeros(len(rows), dtype=torch.float64).index_add(0, _row_of_token(offsets), behavior)
    weights = total - mixture_logprob(total, log_mu, alpha)
    return weights.masked_fill(torch.tensor([_is_out_of_place(row, branch=branch) for row in rows]), -math.inf)


def _is_out_of_place(trajectory: Trajectory, *, branch: Branch) -> bool:
    """Whether a probe's action opens before its hint and closes after it, so that its branch is no place of the row.

    D(y) then lacks what the row came from: it is left to the targets, which cover it (the balance heuristic stays
    exact where a technique gives a sample up).
    """
    if trajectory.kind is not Kind.PROBE or trajectory.branch_point is None:
        return False
    positions, _ = branch_places(trajectory, branch=branch)
    return trajectory.prompt_length + trajectory.branch_point not in positions


def _row_of_token(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def _hint_free_log_ratio(trajectory: Trajectory, *, hints: HintPool, branch: Branch, rates: BranchRates) -> float:
    """Log of φ_j·π_v(suffix | hint) over r(j|y)·π_v(suffix): probe over target, given the branch and the hint.

    A probe has its own branch; a target's was drawn uniformly from J(y), and so r = 1/|J(y)|. −∞ where no probe with
    that hint writes the row; +∞ where r is 0: the probe's action opens before its hint and closes after it, so its
    branch is no position of the finished row.
    """
    positions, turns = branch_places(trajectory, branch=branch)
    scores = trajectory.alternative_logprob
    if trajectory.kind is Kind.PROBE:
        start, goes, end = hint_span(trajectory, hints=hints)
        assert scores is not None, "a probe was scored without its hint"
        target = _sum(trajectory.behavior_logprob[start:goes]) + _sum(scores[end:])
        probe = _sum(trajectory.behavior_logprob[end:])
        # In the row without the hint the forked turn has that many fewer positions.
        in_hint = int(np.sum((start < positions) & (positions <= start + end - goes)))
    else:
        if not len(positions):
            return -math.inf
        if trajectory.alternative_branch is None:
            raise ValueError("a target without alternative_branch cannot be weighted with hint_free transfer")
        start = trajectory.prompt_length + trajectory.alternative_branch
        if scores is None:
            return -math.inf
        target, probe, in_hint = _sum(trajectory.behavior_logprob[start:]), _sum(scores[start:]), 0
    place = int(np.searchsorted(positions, start))
    if place == len(positions) or positions[place] != start:
        if trajectory.kind is Kind.PROBE:
            return math.inf
        raise ValueError(f"token {start} is no branch position of its row")
    log_r = -math.log(len(positions) - in_hint)
    phi = rates.phi(trajectory, BranchPosition(start, int(turns[place])))
    return math.log(phi) - log_r + probe - target


def _sum(values: FloatArray) -> float:
    return float(values.sum(dtype=np.float64))
