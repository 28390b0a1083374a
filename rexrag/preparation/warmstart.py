"""Supervised start: a model learns from weighted demonstrations before it learns from rewards.

demonstrations ─▶ tokens with weights, as a rollout would hold them ─▶ packed micro-batches
               ─▶ −Σ w·log π / Σ w per update ─▶ AdamW, warm-up and linear decay ─▶ model folder

Legend: T tokens of a demonstration, prompt included; E its trained tokens.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rexrag.data.demonstrations import Demonstration, load_demonstrations
from rexrag.env.codec import Codec
from rexrag.env.prompt import render_prompt
from rexrag.errors import DataError, ModelError, RunFailure, counted
from rexrag.files import write_atomic
from rexrag.model.checks import check_model
from rexrag.model.comparison import prepare_model
from rexrag.model.loading import Device, fastest_dtype, load_config, load_model, load_tokenizer
from rexrag.model.logprobs import backward_in_chunks
from rexrag.model.packing import PackedBatch, PackRow, pack
from rexrag.model.saving import save_model
from rexrag.model.supported import check_context
from rexrag.preparation.dead_end import DeadEndDepth, measure_depth

MICRO_BATCH_TOKENS: Final = {"cpu": 1024, "cuda": 8192}
WARMUP_SHARE: Final = 0.05
FINAL_SHARE: Final = 0.1
"""The learning rate falls linearly to this share of its peak."""

INFO_FILE: Final = "warmstart.json"


@dataclass(frozen=True, kw_only=True)
class WarmstartProgress:
    """Where a supervised start stands, after each update."""

    update: int
    num_updates: int
    loss: float
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class WarmstartResult:
    """What a supervised start has done; also written to `warmstart.json` in the model folder.

    Attributes:
        num_tokens: trained on, observations and prompts included, over all epochs.
        losses: mean −log π per unit of weight, one per update.
        depth: how deep the dead end is afterwards; None where the demonstrations have none.
    """

    folder: Path
    num_demonstrations: int
    num_tokens: int
    seconds: float
    losses: tuple[float, ...]
    depth: DeadEndDepth | None


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedRow:
    """A demonstration as tokens. `weights` is [E]: those of the trained tokens, all above 0."""

    row: PackRow
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are written; must be those of the rollouts to come."""

    template: str | None = None
    system_prompt: str | None = None

    def render(self, question: str, *, codec: Codec) -> list[int]:
        return render_prompt(question, codec=codec, template=self.template, system_prompt=self.system_prompt)


@dataclass(kw_only=True)
class _Run:
    """One supervised start while it runs."""

    model: PreTrainedModel
    device: Device
    rows: Sequence[WeightedRow]
    batch_size: int
    epochs: int
    learning_rate: float
    seed: int
    progress: Callable[[WarmstartProgress], None]
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def train(self) -> None:
        """All updates, in an order that depends on the seed alone."""
        order = np.random.default_rng(self.seed)
        starts = range(0, len(self.rows), self.batch_size)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        num_updates = self.epochs * len(starts)
        started = time.monotonic()
        for _ in range(self.epochs):
            indices = order.permutation(len(self.rows))
            for start in starts:
                rate = self.learning_rate * _rate_share(len(self.losses), num_updates)
                self._update([self.rows[i] for i in indices[start : start + self.batch_size]], optimizer, rate=rate)
                seconds = time.monotonic() - started
                self.progress(
                    WarmstartProgress(
                        update=len(self.losses),
                        num_updates=num_updates,
                        loss=self.losses[-1],
                        tokens_per_s=self.num_tokens / max(seconds, 1e-9),
                        seconds=seconds,
                    )
                )

    def _update(self, rows: Sequence[WeightedRow], optimizer: torch.optim.Optimizer, *, rate: float) -> None:
        total_weight = float(sum(row.weights.sum() for row in rows))
        loss = 0.0
        for batch in pack([row.row for row in rows], budget=MICRO_BATCH_TOKENS[self.device], device=self.model.device):
            weights = torch.cat([rows[i].weights for i in batch.rows]).to(self.model.device) / total_weight
            loss += self._backward(batch, weights)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailure(
                _diverged(f"the loss is {loss} and its gradient's norm {norm} at update {len(self.losses) + 1}")
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.num_tokens += sum(len(row.row.token_ids) for row in rows)

    def _backward(self, batch: PackedBatch, weights: Tensor) -> float:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=fastest_dtype(self.device) == "bfloat16"):
            return backward_in_chunks(
                self.model, batch, chunk_loss=lambda logprob, _, chunk: -(logprob * weights[chunk]).sum()
            )


def warm_start(
    model_path: str | Path,
    *,
    demonstrations: Path,
    out: Path,
    seed: int = 0,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    prompt: PromptSettings = PromptSettings(),
    threads: int | None = None,
    device: Device = "cpu",
    progress: Callable[[WarmstartProgress], None] = lambda _: None,
) -> WarmstartResult:
    """Train the model on the demonstrations and write it to `out`, whole or not at all.

    Args:
        prompt: as the rollouts will have it.
        threads: torch threads; None leaves them as they are.
        device: where the model is trained.

    Raises:
        ModelError: `out` exists or cannot be made, or the model is one that training would refuse: it cannot be
            loaded, has too short a context, or is of an architecture that is not supported or whose log-probs packed
            passes do not reproduce.
        DataError: demonstrations that cannot be read, or weights that do not fit the tokens.
        RunFailure: the training diverged.
    """
    _require_place(out)
    shown = load_demonstrations(demonstrations)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    codec = check_model(model_path).codec  # as the training that follows will
    rows = [tokenize_demonstration(one, codec=codec, prompt=prompt) for one in shown]
    model = _prepared_model(model_path, longest=max(len(row.row.token_ids) for row in rows), device=device)
    run = _Run(
        model=model,
        device=device,
        rows=rows,
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )
    started = time.monotonic()
    run.train()
    result = WarmstartResult(
        folder=out,
        num_demonstrations=len(rows),
        num_tokens=run.num_tokens,
        seconds=time.monotonic() - started,
        losses=tuple(run.losses),
        depth=measure_depth(model, shown, codec=codec, render=lambda question: prompt.render(question, codec=codec)),
    )
    _refuse_damage(model)
    _publish(model, load_tokenizer(model_path), result)
    return result


def _prepared_model(path: str | Path, *, longest: int, device: Device) -> PreTrainedModel:
    """The model on its device, its packed passes compared with its own up to the longest demonstration."""
    check_context(load_config(path), longest, what="the longest demonstration", remedy="shorten or leave it out")
    model = load_model(path, dtype="float32")
    model.to(torch.device(device))  # type: ignore[arg-type]
    prepare_model(model, length=longest)
    return model


def tokenize_demonstration(demonstration: Demonstration, *, codec: Codec, prompt: PromptSettings) -> WeightedRow:
    """Prompt and segments as a rollout would hold them: each segment is tokenised by itself.

    Raises:
        DataError: a list of weights whose length is not the number of the segment's tokens.
    """
    ids = prompt.render(demonstration.question, codec=codec)
    weights = [0.0] * len(ids)
    for number, segment in enumerate(demonstration.segments, start=1):
        tokens = codec.encode(segment.text)
        ones = list(segment.weight) if isinstance(segment.weight, tuple) else [segment.weight] * len(tokens)
        if len(ones) != len(tokens):
            raise DataError(
                f"segment {number} of the demonstration for {demonstration.question!r} has "
                f"{counted(len(ones), 'weight')} "
                f"for {counted(len(tokens), 'token')} of this model; give one per token, or a single one"
            )
        ids += tokens
        weights += ones
    trained = np.flatnonzero(weights)
    # All rows may share a prefix: they begin with the same words of the prompt.
    row = PackRow(token_ids=np.asarray(ids, np.int32), trained=trained.astype(np.int64), group=0)
    return WeightedRow(row=row, weights=torch.tensor([weights[i] for i in trained], dtype=torch.float32))


def _require_place(out: Path) -> None:
    """Now, and not after hours of training."""
    if out.exists():
        raise ModelError(f"{out} exists; name a folder that does not")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent).cleanup()
    except OSError as error:
        raise ModelError(f"{out} cannot be made ({error}); name another folder") from error


def _refuse_damage(model: PreTrainedModel) -> None:
    """A last update may break weights without a loss that shows it."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RunFailure(_diverged(f"weight {name} is not finite after the last update"))


def _diverged(what: str) -> str:
    return f"the warm start diverged: {what}; nothing was written. Lower prepare.warmstart_learning_rate"


def _rate_share(update: int, num_updates: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * num_updates))
    return min(1.0, (update + 1) / warmup) * (1.0 - (1.0 - FINAL_SHARE) * update / num_updates)


def _publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, result: WarmstartResult) -> None:
    """Write the model folder beside its place and rename it: it is whole or not there."""
    out = result.folder
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made = Path(scratch) / "model"
        save_model(model, tokenizer, made)
        write_atomic(made / INFO_FILE, _info(result))
        made.rename(out)


def _info(result: WarmstartResult) -> str:
    values = asdict(result) | {"folder": None, "losses": [round(loss, 5) for loss in result.losses]}
    del values["folder"]
    return json.dumps(values, indent=1) + "\n"
