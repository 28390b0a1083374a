"""One optimizer step, without Ray: groups in, weights changed, metrics out (§4 to §9).

StepBatch ─▶ groups ─▶ ages asserted ─▶ filter, advantages, mixture weights ─▶ packing
          ─▶ per micro-batch: log-probs, staleness weights, loss, backward
          ─▶ what was right is preserved ─▶ clip ─▶ AdamW ─▶ StepResult
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

import rexrag.metrics as keys
from rexrag.arrow import group_from_ipc
from rexrag.errors import RunFailure, counted
from rexrag.hints import HintPool
from rexrag.learner.bad_step import save_evidence
from rexrag.learner.branches import BranchRates
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.objective import Objective
from rexrag.learner.optimizer import Optimizer, OptimizerSettings
from rexrag.learner.prepared_step import PreparedRow, PreparedStep, check_ages, prepare_step
from rexrag.learner.preserving import PreservingSet, decrease_penalty, join_gradients, pack_rows, take_gradients
from rexrag.learner.probe_filter import INITIAL_SUCCESS, rho_of, updated_success
from rexrag.learner.samples import pick_samples
from rexrag.learner.step_metrics import StepReport, step_metrics
from rexrag.learner.token_metrics import TokenRecord
from rexrag.learner.trainer_state import TrainerState
from rexrag.model.comparison import prepare_model
from rexrag.model.loading import Device, fastest_dtype
from rexrag.model.logprobs import backward_in_chunks, token_logprobs
from rexrag.model.packing import PackedBatch, PackRow, pack
from rexrag.model.weight_proof import Canary, Precision
from rexrag.types import FloatArray, StepBatch, StepResult, TrajectoryGroup


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """All settings of a learner step.

    Attributes:
        probe: how probes are made and filtered.
        max_staleness: most learner steps between a token's version and its consumption.
        max_length: most tokens of a row; the model's passes are checked up to there.
        micro_batch_tokens: most packed tokens of one forward and backward pass; a longer row goes alone.
        autocast: precision of the linear layers; master weights are float32. "auto": the faster one where the learner
            runs.
        gradient_checkpointing: compute activations again in the backward pass.
        max_bad_steps: consecutive steps with a non-finite loss or gradient that end the run.
    """

    correction: CorrectionSettings
    loss: LossSettings
    optimizer: OptimizerSettings
    probe: ProbeSettings
    max_staleness: int
    max_length: int
    micro_batch_tokens: int
    autocast: Literal["auto", "float32", "bfloat16"]
    gradient_checkpointing: bool
    max_bad_steps: int


@dataclass(kw_only=True)
class _Pass:
    """What the forward and backward passes of a step came to."""

    loss: float = 0.0
    preserve_loss: float | None = None
    preserve_cosine: float | None = None
    records: list[TokenRecord] = field(default_factory=list)
    num_micro_batches: int = 0
    num_packed_tokens: int = 0
    num_row_tokens: int = 0


class LearnerCore:
    """The policy being trained, its optimizer, and the step counter that is its version.

        core = LearnerCore(model, settings=settings, hints=pool, evidence_folder=run_folder)
        result = core.step(batch)             # batch.step == core.num_steps + 1
        weights = core.export_weights(core.weight_sizes, dtype="float32")

    A step without a row that has an advantage (and β = 0), and a skipped one, leave the weights as they are; both
    count. `trainer_state` and `load_trainer_state` carry all but the weights from one process to the next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        settings: LearnerSettings,
        hints: HintPool,
        evidence_folder: Path,
        reference: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            model: float32; its attention is replaced by the packed one.
            evidence_folder: where the batch of a run that fails on non-finite values is written.
            reference: π_ref of the KL term, needed where `loss.kl_coef` is above 0.

        Raises:
            ModelError: an architecture whose log-probs packed passes do not reproduce.
        """
        if (settings.loss.kl_coef > 0.0) != (reference is not None):
            raise ValueError(f"loss.kl_coef is {settings.loss.kl_coef}: above 0 it needs a reference model, at 0 none")
        self.model = model
        self.num_steps = 0
        self.num_passes = 0
        self._settings = settings
        self._hints = hints
        self._reference = reference
        self._evidence_folder = evidence_folder
        self._device = next(model.parameters()).device
        wanted = settings.autocast
        self.precision = fastest_dtype(_kind(self._device)) if wanted == "auto" else wanted
        self._success = INITIAL_SUCCESS
        self._bad_steps = 0
        self._rates = BranchRates()
        self._mean_tokens: float | None = None
        self._preserving = PreservingSet()
        for network in (model, reference):
            if network is not None:
                prepare_model(network, length=settings.max_length)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        self._optimizer = Optimizer(model, settings=settings.optimizer)

    @property
    def rho(self) -> float:
        """ρ of the next step (§8): it comes from the steps before it."""
        return rho_of(self._success, kind=self._settings.probe.filter)

    def step(self, batch: StepBatch) -> StepResult:
        """Train on the groups of one step; at most one optimizer update.

        Raises:
            StaleGroupError: a group older than the staleness bound, or of the future.
            ValueError: a batch of another step, a group that breaks an invariant.
            RunFailure: `max_bad_steps` consecutive steps had a non-finite loss or gradient; the GPU is full.
        """
        started = time.perf_counter()
        if batch.step != self.num_steps + 1:
            raise ValueError(f"the batch is of step {batch.step}, the learner is at step {self.num_steps + 1}")
        groups = [group_from_ipc(memoryview(data)) for data in batch.groups]
        check_ages(groups, version=self.num_steps, max_staleness=self._settings.max_staleness)
        rho = self.rho
        prepared = self._prepare(groups, rho)
        rows = self._rows_to_train(prepared)
        learning_rate = self._optimizer.learning_rate
        before_update = time.perf_counter()
        done, grad_norm, is_bad = self._update(rows, denominator=self._denominator(prepared))
        update_s = time.perf_counter() - before_update
        self._success = updated_success(self._success, right=prepared.num_right_probes, probes=prepared.num_probes)
        if self._settings.loss.preserve > 0.0:
            self._preserving.add(groups)
        self._count_bad(is_bad, batch=batch, loss=done.loss, grad_norm=grad_norm)
        report = StepReport(
            groups=groups,
            prepared=prepared,
            trained=rows,
            records=done.records,
            version=self.num_steps,
            rho=rho,
            success=self._success,
            loss=done.loss,
            preserve_loss=done.preserve_loss,
            preserve_cosine=done.preserve_cosine,
            num_preserved=len(self._preserving.rows),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            updated=bool(rows) and not is_bad,
            bad_steps=self._bad_steps,
            num_micro_batches=done.num_micro_batches,
            num_packed_tokens=done.num_packed_tokens,
            num_row_tokens=done.num_row_tokens,
            update_s=update_s,
        )
        self.num_steps += 1
        metrics, histograms = step_metrics(report, hints=self._hints, correction=self._settings.correction)
        metrics[keys.TIME_STEP] = time.perf_counter() - started
        return StepResult(
            step=batch.step,
            applied=not is_bad,
            updated=report.updated,
            metrics=metrics,
            histograms=histograms,
            samples=pick_samples(groups),
        )

    @property
    def weight_sizes(self) -> dict[str, int]:
        """Bytes of each parameter by its name, a tied head once."""
        return {name: parameter.nbytes for name, parameter in self.model.named_parameters()}

    def export_weights(self, names: Iterable[str], *, dtype: Precision) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays by parameter name; bfloat16 as its bits in uint16.

        On CPU float32 arrays are views of the weights, which the next step changes: copy or publish them first.
        """
        return {name: _as_numpy(self.model.get_parameter(name).detach(), dtype) for name in names}

    def score(self, sequences: Canary) -> tuple[FloatArray, ...]:
        """Log-probs of each sequence's tokens from the second on, under the current weights."""
        if not sequences:
            return ()
        rows = [
            PackRow(token_ids=np.array(ids, np.int32), trained=np.arange(1, len(ids)), group=group)
            for group, ids in enumerate(sequences)
        ]
        scores: dict[int, FloatArray] = {}
        for micro in pack(rows, budget=self._settings.micro_batch_tokens, device=self._device):
            with self._autocast():
                values = token_logprobs(self.model, micro).float().cpu().numpy()
            ends = np.cumsum([len(sequences[i]) - 1 for i in micro.rows])
            scores |= dict(zip(micro.rows, np.split(values, ends[:-1]), strict=True))
        return tuple(scores[i] for i in range(len(sequences)))

    def trainer_state(self) -> TrainerState:
        """All but the weights; its tensors are those of the optimizer, valid until the next step."""
        return TrainerState(
            step=self.num_steps,
            num_updates=self._optimizer.num_updates,
            success=self._success,
            bad_steps=self._bad_steps,
            num_solved=self._preserving.num_seen,
            mean_tokens=self._mean_tokens,
            branch_counts=self._rates.table(),
            optimizer=self._optimizer.state(),
            preserved=self._preserving.tensors(),
            rng=torch.get_rng_state(),
        )

    def load_trainer_state(self, state: TrainerState) -> None:
        """Go on where `trainer_state` was taken; the model's weights are loaded apart from it."""
        self._optimizer.load_state(state.optimizer, num_updates=state.num_updates)
        self.num_steps = state.step
        self._success = state.success
        self._bad_steps = state.bad_steps
        self._mean_tokens = state.mean_tokens
        self._preserving.load(state.preserved, num_seen=state.num_solved)
        self._rates = BranchRates.of_table(state.branch_counts)
        torch.set_rng_state(state.rng)

    def _prepare(self, groups: Sequence[TrajectoryGroup], rho: float) -> PreparedStep:
        return prepare_step(
            groups,
            rho=rho,
            probe=self._settings.probe,
            correction=self._settings.correction,
            loss=self._settings.loss,
            hints=self._hints,
            rates=self._rates,
        )

    def _rows_to_train(self, prepared: PreparedStep) -> list[PreparedRow]:
        """Rows that have a gradient: those with an advantage, all of them where the KL term acts."""
        needs_all = self._settings.loss.kl_coef > 0.0
        return [row for row in prepared.rows if len(row.tokens.trained) and (needs_all or row.advantage != 0.0)]

    def _update(self, rows: Sequence[PreparedRow], *, denominator: float) -> tuple[_Pass, float | None, bool]:
        """The passes over the rows, then what `_finish_update` returns."""
        try:
            done = self._forward_backward(rows, denominator=denominator)
            if rows and math.isfinite(done.loss):
                self._preserve(done)
            grad_norm, is_bad = self._finish_update(done, has_rows=bool(rows))
        except torch.OutOfMemoryError as error:
            raise RunFailure(
                f"step {self.num_steps + 1} does not fit into the GPU's memory with learner.micro_batch_tokens = "
                f"{self._settings.micro_batch_tokens}: resume with a lower one, or with learner.gradient_checkpointing "
                f"({error})"
            ) from error
        return done, grad_norm, is_bad

    def _forward_backward(self, rows: Sequence[PreparedRow], *, denominator: float) -> _Pass:
        done = _Pass()
        packed_rows = [
            PackRow(token_ids=row.tokens.token_ids, trained=row.tokens.trained, group=row.group) for row in rows
        ]
        for micro in pack(packed_rows, budget=self._settings.micro_batch_tokens, device=self._device):
            objective = Objective(
                [rows[i] for i in micro.rows],
                denominator=denominator,
                version=self.num_steps,
                correction=self._settings.correction,
                loss=self._settings.loss,
                reference_logprob=self._reference_logprob(micro),
                proximal_logprob=self._proximal_logprob(micro),
                device=self._device,
            )
            with self._autocast():
                done.loss += backward_in_chunks(self.model, micro, chunk_loss=objective.chunk_loss)
            done.records += objective.records
            done.num_micro_batches += 1
            self.num_passes += 1
            done.num_packed_tokens += len(micro.token_ids)
            done.num_row_tokens += micro.num_row_tokens
            if not math.isfinite(done.loss):
                break
        return done

    def _preserve(self, done: _Pass) -> None:
        """Change the gradient at hand by that of the penalty on what solved groups have lost in likelihood."""
        loss = self._settings.loss
        rows = self._preserving.draw(loss.preserve_rows, step=self.num_steps + 1)
        num_tokens = sum(len(row.trained) for row in rows)
        if not rows:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        objective = take_gradients(parameters)
        total = 0.0
        for micro in pack(pack_rows(rows), budget=self._settings.micro_batch_tokens, device=self._device):
            kept = torch.from_numpy(np.concatenate([rows[i].logprob for i in micro.rows])).to(self._device)

            def penalty(
                logprob: torch.Tensor, _: torch.Tensor, chunk: slice, kept: torch.Tensor = kept
            ) -> torch.Tensor:
                lost = decrease_penalty(logprob, kept_logprob=kept[chunk], knee=loss.preserve_knee)
                return loss.preserve * lost.sum() / num_tokens

            with self._autocast():
                total += backward_in_chunks(self.model, micro, chunk_loss=penalty)
            self.num_passes += 1
        done.preserve_cosine = join_gradients(parameters, objective=objective)
        done.preserve_loss = total
        done.loss += total

    def _finish_update(self, done: _Pass, *, has_rows: bool) -> tuple[float | None, bool]:
        """Update or discard; the gradient norm (None without a gradient), and whether something was not finite."""
        if not has_rows:
            return None, False
        grad_norm = self._optimizer.clip() if math.isfinite(done.loss) else math.nan
        if math.isfinite(grad_norm):
            self._optimizer.update()
            return grad_norm, False
        self._optimizer.discard()
        return grad_norm, True

    def _count_bad(self, is_bad: bool, *, batch: StepBatch, loss: float, grad_norm: float | None) -> None:
        self._bad_steps = self._bad_steps + 1 if is_bad else 0
        if self._bad_steps < self._settings.max_bad_steps:
            return
        path = save_evidence(self._evidence_folder, batch=batch, loss=loss, grad_norm=grad_norm)
        raise RunFailure(
            f"the loss or its gradient was not finite in {counted(self._bad_steps, 'consecutive step')} up to "
            f"step {batch.step} "
            f"(loss {loss}, gradient norm {grad_norm}); the last batch is in {path}. Lower optimizer.learning_rate, "
            f"or resume from an earlier checkpoint"
        )

    def _reference_logprob(self, micro: PackedBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._autocast():
            return token_logprobs(self._reference, micro)

    def _proximal_logprob(self, micro: PackedBatch) -> torch.Tensor | None:
        """Where one staleness weight is the product over a row, it must be known before the backward pass."""
        if self._settings.correction.mixture != "sequence":
            return None
        with self._autocast():
            return token_logprobs(self.model, micro)

    def _denominator(self, prepared: PreparedStep) -> float:
        """N of §7. With weights of trajectories it must not depend on what was drawn: (1 + p)·targets·(a constant)."""
        if not self._settings.correction.weighs_trajectories:
            return prepared.denominator
        if self._mean_tokens is None and prepared.rows:
            self._mean_tokens = max(1.0, prepared.denominator / len(prepared.rows))
        return (1.0 + self._settings.probe.rate) * prepared.num_targets * (self._mean_tokens or 1.0)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=enabled)


def _kind(device: torch.device) -> Device:
    return "cuda" if device.type == "cuda" else "cpu"


def _as_numpy(weights: torch.Tensor, dtype: Precision) -> npt.NDArray[np.generic]:
    if dtype == "float32":
        return weights.float().cpu().numpy()
    return weights.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
