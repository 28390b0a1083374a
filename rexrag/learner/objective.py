"""The objective of one micro-batch, computed chunk by chunk as its log-probs come (§6, §7).

Legend: E trained tokens of the micro-batch, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.learner.correction import CorrectionSettings, importance_weight
from rexrag.learner.loss import LossSettings, kl_k3, policy_loss
from rexrag.learner.prepared_step import PreparedRow
from rexrag.learner.token_metrics import TokenRecord
from rexrag.types import Kind


class Objective:
    """Sum of L_t/N over a micro-batch, with the weights and what is measured of them.

    π_prox is π_θ itself, detached: a batch takes one update. Lifecycle: `chunk_loss` once per chunk, then `records`.
    """

    def __init__(
        self,
        rows: Sequence[PreparedRow],
        *,
        denominator: float,
        version: int,
        correction: CorrectionSettings,
        loss: LossSettings,
        reference_logprob: Tensor | None,
        proximal_logprob: Tensor | None,
        device: torch.device,
    ) -> None:
        """
        Args:
            rows: in packed order.
            denominator: N of §7, over the whole step.
            version: of the learner, for the mismatch of engine and learner.
            reference_logprob: [E] under the reference model, None without a KL term.
            proximal_logprob: [E] log π_prox, where a row's staleness weight is the product over its tokens
                (`sequence`); None: each token has its own, from its log-prob in the forward pass.
        """

        def per_token(values: Callable[[PreparedRow], npt.NDArray[np.generic]]) -> Tensor:
            return torch.from_numpy(np.concatenate([values(row) for row in rows])).to(device)

        counts = torch.tensor([len(row.tokens.trained) for row in rows], device=device)

        def per_row(values: Callable[[PreparedRow], float]) -> Tensor:
            return torch.tensor([values(row) for row in rows], device=device).repeat_interleave(counts)

        self._rows = rows
        self._denominator = denominator
        self._correction = correction
        self._loss = loss
        self._reference = reference_logprob
        self._advantage = per_row(lambda row: row.advantage)
        self._is_probe = per_row(lambda row: float(row.trajectory.kind is Kind.PROBE))
        self._is_correct = per_row(lambda row: float(row.trajectory.correct)) > 0
        self._behavior = per_token(lambda row: row.tokens.behavior_logprob)
        self._is_policy = per_token(lambda row: row.tokens.is_policy)
        self._is_current = per_token(lambda row: row.tokens.policy_version == version)
        self._mixture = per_token(lambda row: row.mixture_weight)
        self._row = torch.arange(len(rows), device=device).repeat_interleave(counts)
        self._row_log_ratio = None
        if proximal_logprob is not None:
            sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
            sums.index_add_(0, self._row, (proximal_logprob - self._behavior).double())
            self._row_log_ratio = sums[self._row].to(self._behavior.dtype)
        self.records: list[TokenRecord] = []

    def chunk_loss(self, logprob: Tensor, entropy: Tensor, chunk: slice) -> Tensor:
        """Summed loss of a chunk, already divided by N; NaN where a log-prob is not finite."""
        current = logprob.detach()
        log_ratio = current - self._behavior[chunk] if self._row_log_ratio is None else self._row_log_ratio[chunk]
        # A row's ratio has the log-probs of chunks to come in it.
        if not bool(torch.isfinite(current).all()) or not bool((log_ratio < math.inf).all()):
            return (logprob * math.nan).sum()
        bounds = self._correction
        stale = importance_weight(log_ratio, bound=bounds.bound, cap=bounds.cap, low=bounds.low, high=bounds.high)
        weight = self._mixture[chunk] * stale
        parts = policy_loss(
            logprob, proximal_logprob=current, advantage=self._advantage[chunk], weight=weight, settings=self._loss
        )
        total = parts.loss.sum()
        kl = torch.full_like(current, math.nan)
        if self._reference is not None:
            policy_kl = kl_k3(logprob, reference_logprob=self._reference[chunk])[self._is_policy[chunk]]
            total = total + self._loss.kl_coef * policy_kl.sum()
            kl[self._is_policy[chunk]] = policy_kl.detach()
        nan = torch.full_like(current, math.nan)
        is_policy = self._is_policy[chunk]
        # Sampled from the engine: k3 of KL(engine ‖ learner) takes learner/engine as its ratio.
        mismatch = kl_k3(self._behavior[chunk], reference_logprob=current)
        self.records.append(
            TokenRecord(
                rows=self._rows,
                row=self._row[chunk],
                weight=weight,
                pull=(weight * self._advantage[chunk]).abs(),
                stale_ratio=log_ratio.exp(),
                log_ratio=current - self._behavior[chunk],
                is_current=self._is_current[chunk],
                is_probe=self._is_probe[chunk],
                entropy=entropy.detach(),
                kl=kl,
                mismatch=torch.where(is_policy & self._is_current[chunk], mismatch, nan),
                correct_logprob=torch.where(is_policy & self._is_correct[chunk], current, nan),
                is_clipped_low=parts.is_clipped_low,
                is_clipped_high=parts.is_clipped_high,
                is_dual_clipped=parts.is_dual_clipped,
            )
        )
        return total / self._denominator
