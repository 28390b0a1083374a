"""One optimizer step, without Ray: groups in, weights changed, metrics out (§4 to §9).

StepBatch ─▶ groups ─▶ ages asserted ─▶ filter, advantages, mixture weights ─▶ packing
          ─▶ per micro-batch: log-probs, staleness weights, loss, backward
          ─▶ what was right is preserved ─▶ clip ─▶ AdamW ─▶ StepResult
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
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
from rexrag.learner.optimizer import Optimizer, OptimizerSettings
from rexrag.learner.passes import Passed, Passes
from rexrag.learner.prepared_step import PreparedRow, PreparedStep, check_ages, prepare_step
from rexrag.learner.preserving import PreservingSet
from rexrag.learner.probe_filter import INITIAL_SUCCESS, rho_of, updated_success
from rexrag.learner.ranks import Ranks
from rexrag.learner.samples import pick_samples
from rexrag.learner.step_metrics import StepReport, step_metrics
from rexrag.learner.trainer_state import TrainerState
from rexrag.model.adapters import (
    adapter_tensors,
    full_weight,
    has_adapters,
    is_adapted,
    narrow_frozen,
    own_names,
    rounded,
    set_adapters,
)
from rexrag.model.comparison import prepare_model
from rexrag.model.loading import Device, fastest_dtype
from rexrag.model.sharding import gather_tensors, whole
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
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            model: float32; its attention is replaced by the packed one. Where it has adapters, these alone are trained.
            evidence_folder: where the batch of a run that fails on non-finite values is written.
            reference: π_ref of the KL term, needed where `loss.kl_coef` is above 0; with adapters it is the model
                without them, and must be None.
            ranks: those that hold both models in shards; None: this process has them alone.

        Raises:
            ModelError: an architecture whose log-probs packed passes do not reproduce.
        """
        adapted = has_adapters(model)
        if (settings.loss.kl_coef > 0.0 and not adapted) != (reference is not None):
            needs = "above 0 it needs a reference model, at 0 and with adapters none"
            raise ValueError(f"loss.kl_coef is {settings.loss.kl_coef}: {needs}")
        self.model = model
        self.num_steps = 0
        self._settings = settings
        self._hints = hints
        self._ranks = ranks or Ranks()
        self._evidence_folder = evidence_folder
        wanted = settings.autocast
        device: Device = "cuda" if next(model.parameters()).device.type == "cuda" else "cpu"
        fastest = self._ranks.gather(fastest_dtype(device))
        self.precision = wanted if wanted != "auto" else "float32" if "float32" in fastest else "bfloat16"
        self._success = INITIAL_SUCCESS
        self._bad_steps = 0
        self._rates = BranchRates()
        self._mean_tokens: float | None = None
        self._preserving = PreservingSet()
        for network in (model, reference):
            if network is not None:
                prepare_model(network, length=settings.max_length)
        # Of a model in shards the weights are float32: what one holds at once is little.
        if adapted and self.precision == "bfloat16" and self._ranks.num == 1:
            narrow_frozen(model, torch.bfloat16)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        self._optimizer = Optimizer(model, settings=settings.optimizer)
        self._passes = Passes(
            model,
            reference=reference,
            correction=settings.correction,
            loss=settings.loss,
            micro_batch_tokens=settings.micro_batch_tokens,
            precision=self.precision,
            ranks=self._ranks,
        )

    @property
    def num_passes(self) -> int:
        """Passes of the model so far, which grow in the course of a step."""
        return self._passes.num_made

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
        """Bytes, in float32, of each of the model's weights by its name, a tied head once."""
        float32 = torch.float32.itemsize
        return {name: float32 * self.model.get_parameter(own).numel() for name, own in own_names(self.model).items()}

    def export_weights(self, names: Iterable[str], *, dtype: Precision) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays by parameter name; bfloat16 as its bits in uint16. Of several ranks the first has them, others none.

        On CPU float32 arrays are views of the weights, which the next step changes: copy or publish them first.
        """
        own = own_names(self.model)
        parts = {name: self._narrowed(own[name], dtype) for name in names}
        tensors = gather_tensors(parts, keep=self._ranks.is_first)
        return {name: _as_numpy(tensor) for name, tensor in tensors.items()}

    def _narrowed(self, name: str, dtype: Precision) -> Tensor:
        """A weight by its name in the model, with what an adapter adds; the same for a version each time."""
        weight = full_weight(self.model, name)
        if dtype == "bfloat16" and is_adapted(name):
            return rounded(weight, seed=zlib.crc32(f"{self.num_steps} {name}".encode()))
        return weight.to(getattr(torch, dtype))

    def stored_weights(self) -> dict[str, Tensor] | None:
        """What a checkpoint stores of a model in shards or with adapters, on the first rank; None: its own tensors."""
        if self._ranks.num == 1 and not has_adapters(self.model):
            return None
        weights = {}
        for name, own in own_names(self.model).items():  # one at a time on the GPU
            # With adapters it is what the engines have: others may round to the nearest, and drop what is small.
            weight = whole(self._narrowed(own, self.precision if is_adapted(own) else "float32"))
            if self._ranks.is_first:
                weights[name] = weight.cpu().float()
        return weights

    def score(self, sequences: Canary) -> tuple[FloatArray, ...]:
        """Log-probs of each sequence's tokens from the second on, under the current weights."""
        return self._passes.score(sequences)

    def trainer_state(self) -> TrainerState:
        """All but the weights; its tensors are those of the optimizer, valid until the next step.

        Of several ranks the first has the optimizer's, whole.
        """
        return TrainerState(
            step=self.num_steps,
            num_updates=self._optimizer.num_updates,
            success=self._success,
            bad_steps=self._bad_steps,
            num_solved=self._preserving.num_seen,
            mean_tokens=self._mean_tokens,
            branch_counts=self._rates.table(),
            optimizer=gather_tensors(self._optimizer.state(), keep=self._ranks.is_first),
            adapters=gather_tensors(adapter_tensors(self.model), keep=self._ranks.is_first),
            preserved=self._preserving.tensors(),
            rng=torch.get_rng_state(),
        )

    def load_trainer_state(self, state: TrainerState) -> None:
        """Go on where `trainer_state` was taken; the model's weights are loaded apart from it, adapters are in it."""
        set_adapters(self.model, state.adapters)
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

    def _update(self, rows: Sequence[PreparedRow], *, denominator: float) -> tuple[Passed, float | None, bool]:
        """The passes over the rows, then what `_finish_update` returns."""
        try:
            done = self._passes.train(rows, denominator=denominator, version=self.num_steps)
            if rows and math.isfinite(done.loss):
                num_kept = self._settings.loss.preserve_rows
                self._passes.preserve(self._preserving.draw(num_kept, step=self.num_steps + 1), done)
            grad_norm, is_bad = self._finish_update(done, has_rows=bool(rows))
        except torch.OutOfMemoryError as error:
            raise RunFailure(
                f"step {self.num_steps + 1} does not fit into the GPU's memory with learner.micro_batch_tokens = "
                f"{self._settings.micro_batch_tokens}: resume with a lower one, or with learner.gradient_checkpointing "
                f"({error})"
            ) from error
        return done, grad_norm, is_bad

    def _finish_update(self, done: Passed, *, has_rows: bool) -> tuple[float | None, bool]:
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
        kept = "the first rank keeps the last batch"
        if self._ranks.is_first:
            try:
                path = save_evidence(self._evidence_folder, batch=batch, loss=loss, grad_norm=grad_norm)
                kept = f"the last batch is in {path}"
            except OSError as error:  # why the run ends has more to say
                kept = f"the last batch could not be kept ({error})"
        raise RunFailure(
            f"the loss or its gradient was not finite in {counted(self._bad_steps, 'consecutive step')} up to "
            f"step {batch.step} "
            f"(loss {loss}, gradient norm {grad_norm}); {kept}. Lower optimizer.learning_rate, or resume from an "
            "earlier checkpoint"
        )

    def _denominator(self, prepared: PreparedStep) -> float:
        """N of §7. With weights of trajectories it must not depend on what was drawn: (1 + p)·targets·(a constant)."""
        if not self._settings.correction.weighs_trajectories:
            return prepared.denominator
        if self._mean_tokens is None and prepared.rows:
            self._mean_tokens = max(1.0, prepared.denominator / len(prepared.rows))
        return (1.0 + self._settings.probe.rate) * prepared.num_targets * (self._mean_tokens or 1.0)


def _as_numpy(weights: Tensor) -> npt.NDArray[np.generic]:
    weights = weights.cpu()
    return weights.view(torch.int16).numpy().view(np.uint16) if weights.dtype == torch.bfloat16 else weights.numpy()
