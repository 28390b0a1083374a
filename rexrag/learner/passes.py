"""The passes of a step over its rows: gradients of the objective and of what preserves, and log-probs without any.

Where the learner has several ranks each takes its part of the rows. A pass of a sharded model is a collective, so a
rank with fewer micro-batches makes the others' passes with a row that counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.objective import Objective
from rexrag.learner.prepared_step import PreparedRow
from rexrag.learner.preserving import PreservedRow, decrease_penalty, join_gradients, pack_rows, take_gradients
from rexrag.learner.ranks import Ranks
from rexrag.learner.token_metrics import TokenRecord
from rexrag.model.adapters import without_adapters
from rexrag.model.logprobs import ChunkLoss, backward_in_chunks, token_logprobs
from rexrag.model.packing import PackedBatch, PackRow, pack
from rexrag.model.weight_proof import Canary, Precision
from rexrag.types import FloatArray

_IDLE_ROW: Final = PackRow(token_ids=np.zeros(2, np.int32), trained=np.array([1]), group=0)


@dataclass(kw_only=True)
class Passed:
    """What the forward and backward passes of a step came to, over all ranks."""

    loss: float = 0.0
    preserve_loss: float | None = None
    preserve_cosine: float | None = None
    records: list[TokenRecord] = field(default_factory=list)
    num_micro_batches: int = 0
    num_packed_tokens: int = 0
    num_row_tokens: int = 0


def _packing_order(row: PreparedRow) -> tuple[int, bytes]:
    """Rows of a group that begin alike are side by side, so that a micro-batch computes once what they share."""
    return row.group, row.tokens.token_ids.astype(">u4").tobytes()


class Passes:
    """Of one model; `num_made` grows with each pass of a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        reference: PreTrainedModel | None,
        correction: CorrectionSettings,
        loss: LossSettings,
        micro_batch_tokens: int,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        self.num_made = 0
        self._model = model
        self._reference = reference
        self._correction = correction
        self._loss = loss
        self._budget = micro_batch_tokens
        self._precision = precision
        self._ranks = ranks
        self._device = next(model.parameters()).device

    def train(self, rows: Sequence[PreparedRow], *, denominator: float, version: int) -> Passed:
        """Add the gradient of the rows' objective to the parameters'. It ends early where the loss is not finite.

        Args:
            rows: of the whole step. denominator: N of §7. version: of the learner.
        """
        done = Passed()
        rows = sorted(rows, key=_packing_order)
        packed_rows = [
            PackRow(token_ids=row.tokens.token_ids, trained=row.tokens.trained, group=row.group) for row in rows
        ]
        own = self._part(packed_rows)
        first = own.start
        indices: list[list[int]] = []
        for micro in self._aligned(pack(packed_rows[own], budget=self._budget, device=self._device)):
            batch = micro or self._idle()
            reference, proximal = self._reference_logprob(batch), self._proximal_logprob(batch)
            if micro is None:
                done.loss += self._backward(batch, _nothing)
            else:
                of_micro = [first + i for i in micro.rows]
                objective = Objective(
                    [rows[i] for i in of_micro],
                    denominator=denominator,
                    version=version,
                    correction=self._correction,
                    loss=self._loss,
                    reference_logprob=reference,
                    proximal_logprob=proximal,
                    device=self._device,
                )
                done.loss += self._backward(batch, objective.chunk_loss)
                done.records += objective.records
                indices += [of_micro] * len(objective.records)
                done.num_micro_batches += 1
                done.num_packed_tokens += len(micro.token_ids)
                done.num_row_tokens += micro.num_row_tokens
            if not math.isfinite(done.loss):
                break
        return self._of_all(done, rows=rows, indices=indices)

    def preserve(self, kept_rows: Sequence[PreservedRow], done: Passed) -> None:
        """Change the gradient at hand by that of the penalty on what the kept rows have lost in likelihood."""
        if not kept_rows:
            return
        num_tokens = sum(len(row.trained) for row in kept_rows)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        objective = take_gradients(parameters)
        total = 0.0
        packed_rows = pack_rows(kept_rows)
        own = self._part(packed_rows)
        for micro in self._aligned(pack(packed_rows[own], budget=self._budget, device=self._device)):
            if micro is None:
                total += self._backward(self._idle(), _nothing)
                continue
            logprobs = [kept_rows[own.start + i].logprob for i in micro.rows]
            kept = torch.from_numpy(np.concatenate(logprobs)).to(self._device)

            def penalty(logprob: Tensor, _: Tensor, chunk: slice, kept: Tensor = kept) -> Tensor:
                lost = decrease_penalty(logprob, kept_logprob=kept[chunk], knee=self._loss.preserve_knee)
                return self._loss.preserve * lost.sum() / num_tokens

            total += self._backward(micro, penalty)
        done.preserve_cosine = join_gradients(parameters, objective=objective, ranks=self._ranks)
        done.preserve_loss = total
        done.loss += total

    def score(self, sequences: Canary) -> tuple[FloatArray, ...]:
        """Log-probs of each sequence's tokens from the second on; every rank scores all of them."""
        if not sequences:
            return ()
        rows = [
            PackRow(token_ids=np.array(ids, np.int32), trained=np.arange(1, len(ids)), group=group)
            for group, ids in enumerate(sequences)
        ]
        scores: dict[int, FloatArray] = {}
        for micro in pack(rows, budget=self._budget, device=self._device):
            with self._autocast():
                values = token_logprobs(self._model, micro).float().cpu().numpy()
            ends = np.cumsum([len(sequences[i]) - 1 for i in micro.rows])
            scores |= dict(zip(micro.rows, np.split(values, ends[:-1]), strict=True))
        return tuple(scores[i] for i in range(len(sequences)))

    def _part(self, rows: Sequence[PackRow]) -> slice:
        return self._ranks.part([len(row.inputs) for row in rows])

    def _aligned(self, batches: Sequence[PackedBatch]) -> list[PackedBatch | None]:
        """This rank's micro-batches, then None as often as another rank has more."""
        most = max(self._ranks.gather(len(batches)))
        return [*batches, *[None] * (most - len(batches))]

    def _idle(self) -> PackedBatch:
        (batch,) = pack([_IDLE_ROW], budget=self._budget, device=self._device)
        return batch

    def _backward(self, batch: PackedBatch, chunk_loss: ChunkLoss) -> float:
        with self._autocast():
            total = backward_in_chunks(self._model, batch, chunk_loss=chunk_loss, total_of=self._ranks.sum)
        self.num_made += 1
        return total

    def _of_all(self, done: Passed, *, rows: Sequence[PreparedRow], indices: Sequence[Sequence[int]]) -> Passed:
        """What all ranks have done; the loss is that already."""
        if self._ranks.num == 1:
            return done
        own = [(of_micro, _tensors(record)) for of_micro, record in zip(indices, done.records, strict=True)]
        sizes = (done.num_micro_batches, done.num_packed_tokens, done.num_row_tokens)
        all_records, all_sizes = zip(*self._ranks.gather((own, sizes)), strict=True)
        micro_batches, packed_tokens, row_tokens = (sum(part) for part in zip(*all_sizes, strict=True))
        return replace(
            done,
            records=[
                TokenRecord(rows=[rows[i] for i in of_micro], **tensors)
                for records in all_records
                for of_micro, tensors in records
            ],
            num_micro_batches=micro_batches,
            num_packed_tokens=packed_tokens,
            num_row_tokens=row_tokens,
        )

    def _reference_logprob(self, micro: PackedBatch) -> Tensor | None:
        if not self._loss.kl_coef:
            return None
        with self._autocast():
            if self._reference is not None:
                return token_logprobs(self._reference, micro)
            with without_adapters(self._model):
                return token_logprobs(self._model, micro)

    def _proximal_logprob(self, micro: PackedBatch) -> Tensor | None:
        """Where one staleness weight is the product over a row, it must be known before the backward pass."""
        if self._correction.mixture != "sequence":
            return None
        with self._autocast():
            return token_logprobs(self._model, micro)

    def _autocast(self) -> torch.autocast:
        enabled = self._precision == "bfloat16"
        # What is gathered for a layer goes again; a cache would keep its narrow copy on every rank.
        keeps = self._ranks.num == 1
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keeps)


def _nothing(logprob: Tensor, _: Tensor, chunk: slice) -> Tensor:
    return 0.0 * logprob.sum()


def _tensors(record: TokenRecord) -> dict[str, Tensor]:
    """A record without its rows, in host memory."""
    names = [field.name for field in fields(record) if field.name != "rows"]
    return {name: getattr(record, name).cpu() for name in names}
