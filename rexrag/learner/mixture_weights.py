"""w_mix = π_v/q of the rows of a step, whatever the mixture (§5, §5b, §6).

Legend: E trained tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rexrag.env.branch import Branch
from rexrag.hints import HintPool
from rexrag.learner.branches import BranchRates
from rexrag.learner.correction import CorrectionSettings, importance_weight, mixture_logprob, token_probe_logprob
from rexrag.learner.loss import LossSettings
from rexrag.learner.probe_filter import FilterKind
from rexrag.learner.sequence_weights import sequence_log_weights
from rexrag.learner.trained_tokens import TrainedTokens, Transfer, trained_tokens
from rexrag.types import FloatArray, Trajectory


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What the learner has to know of how probes are made (§2, §5b, §8). `rate` is p."""

    rate: float
    branch: Branch
    transfer: Transfer
    filter: FilterKind


class MixtureWeigher:
    """Weights of the rows of one step. Where they are those of trajectories, `weigh_sequences` comes before the others.

    `alpha` is α: of the step's rows with `token`, that which p implies with `sequence` and `normalized`.
    """

    def __init__(
        self,
        *,
        correction: CorrectionSettings,
        probe: ProbeSettings,
        hints: HintPool,
        num_probes: int,
        num_targets: int,
    ) -> None:
        self._correction = correction
        self._probe = probe
        self._hints = hints
        self._sequences: dict[Trajectory, float] = {}
        if correction.weighs_trajectories:
            self.alpha = probe.rate / (1.0 + probe.rate)
        else:
            self.alpha = num_probes / (num_probes + num_targets) if num_probes else 0.0
        assert self.alpha < 1.0, "a probe's parent counts in the step"

    def weigh_sequences(self, rows: Sequence[Trajectory], rates: BranchRates) -> None:
        probe = self._probe
        log_weights = sequence_log_weights(
            rows, probe_rate=probe.rate, hints=self._hints, branch=probe.branch, transfer=probe.transfer, rates=rates
        )
        self._sequences = dict(zip(rows, log_weights.tolist(), strict=True))

    def log_weight(self, row: Trajectory) -> float:
        """Log w of the whole trajectory, −∞ where no target could have written it."""
        return self._sequences[row]

    def tokens_of(self, row: Trajectory, loss: LossSettings) -> TrainedTokens:
        return trained_tokens(
            row,
            hints=self._hints,
            transfer=self._probe.transfer,
            train_hints=loss.train_hints,
            train_prefix=loss.train_prefix,
        )

    def weights(self, row: Trajectory, tokens: TrainedTokens) -> FloatArray:
        """[E] w_mix, unbounded: it is at most 1/(1−α)."""
        if self._correction.mixture == "token":
            weight: FloatArray = importance_weight(self._log_ratio(row, tokens), bound="none").numpy()
            return weight
        # Those of `normalized` are in the advantages.
        same = math.exp(self._sequences[row]) if self._correction.mixture == "sequence" else 1.0
        return np.full(len(tokens.trained), same, tokens.behavior_logprob.dtype)

    def log_mixture(self, row: Trajectory, weight: FloatArray) -> float:
        """Log of what a row owes to probe mixing: of its weight, or of the product of those of its tokens [E]."""
        if self._correction.weighs_trajectories:
            return self._sequences[row]
        return float(np.log(weight.astype(np.float64)).sum())

    def _log_ratio(self, row: Trajectory, tokens: TrainedTokens) -> torch.Tensor:
        """[E] log π_v/q_t of the `token` mixture."""
        behavior = torch.from_numpy(tokens.behavior_logprob)
        log_mu = token_probe_logprob(row, hints=self._hints, transfer=self._probe.transfer)[tokens.source]
        return behavior - mixture_logprob(behavior, torch.from_numpy(log_mu), self.alpha)
