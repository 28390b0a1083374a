"""One pass of the engine: copies, forward, draws and scores, all in one thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rexrag.engine.kv_cache import KvCache
from rexrag.engine.llama_forward import LlamaForward, Span
from rexrag.engine.llama_weights import LlamaWeights
from rexrag.engine.sampling import Sampler, counter_uniforms
from rexrag.engine.scheduler import LiveSequence, PlannedSpan, StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class Outcome:
    """What a pass gives for one span: a token where the sequence ends with it, and the scores asked for."""

    token_id: int | None = None
    logprob: float = 0.0
    scores: list[float] = field(default_factory=list)


class ModelPass:
    """Weights and cache, and the pass over them.

    Attributes:
        prefilled_tokens: tokens computed beyond one per sequence and pass; forward_s: seconds in passes.
    """

    def __init__(
        self, model: PreTrainedModel, *, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Raises:
            ModelError: the architecture is not supported, or the model's context is shorter than `max_length`.
        """
        self.weights = LlamaWeights(model, dtype=dtype, max_length=max_length, device=device)
        shape = self.weights.shape
        self._cache = KvCache(
            num_layers=shape.num_layers,
            num_slots=num_slots,
            num_kv_heads=shape.num_kv_heads,
            max_length=max_length,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=device,
        )
        self._forward = LlamaForward(self.weights, cache=self._cache)
        self._sampler = Sampler(self.weights.head, vocab_size=shape.vocab_size, device=device)
        self.prefilled_tokens = 0
        self.forward_s = 0.0

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[Outcome]:
        """Outcomes in the order of the plan's spans."""
        began = time.perf_counter()
        for copy in plan.copies:
            self._cache.copy(source=copy.source, target=copy.target, length=copy.length)
        # The forward pass wants single tokens first, by slot.
        spans = sorted(plan.spans, key=lambda s: (s.end - s.start > 1, s.sequence.slot))
        hidden = self._forward([_model_span(span) for span in spans])
        outcomes = {span.sequence: Outcome() for span in plan.spans}
        ends = np.cumsum([span.end - span.start for span in spans]).tolist()
        self._sample(spans, ends, hidden, outcomes)
        for span, end in zip(spans, ends, strict=True):
            if span.completes and span.sequence.wants_scores:
                outcomes[span.sequence].scores = self._score(span, hidden[end - (span.end - span.start) : end])
        self.prefilled_tokens += sum(span.end - span.start for span in spans if span.end - span.start > 1)
        self.forward_s += time.perf_counter() - began
        return [outcomes[span.sequence] for span in plan.spans]

    def _sample(
        self, spans: Sequence[PlannedSpan], ends: list[int], hidden: Tensor, outcomes: dict[LiveSequence, Outcome]
    ) -> None:
        """Draw the next token of every sequence whose last known token was in the pass."""
        complete = [(span.sequence, end - 1) for span, end in zip(spans, ends, strict=True) if span.completes]
        if not complete:
            return
        sequences = [sequence for sequence, _ in complete]
        tokens, logprobs = self._sampler.sample(
            self._forward.last_norm(hidden[[row for _, row in complete]]),
            uniforms=counter_uniforms([s.request.seed for s in sequences], [len(s.logprobs) for s in sequences]),
            greedy=np.array([s.request.greedy for s in sequences]),
        )
        if not np.isfinite(logprobs).all():
            raise FloatingPointError("the model gave logits that are not finite; its weights have diverged")
        for sequence, token_id, logprob in zip(sequences, tokens, logprobs, strict=True):
            outcomes[sequence].token_id, outcomes[sequence].logprob = token_id, logprob

    def _score(self, span: PlannedSpan, hidden: Tensor) -> list[float]:
        """Log-probs of the prompt from `score_from` on; `hidden` [n, D] is the span's."""
        first = span.sequence.request.score_from
        assert first is not None
        assert span.start < first, "the positions that give scores are in one pass"
        targets = span.sequence.token_ids[first : span.end]
        rows = hidden[first - 1 - span.start : span.end - 1 - span.start]
        return self._sampler.score(self._forward.last_norm(rows), targets)


def _model_span(span: PlannedSpan) -> Span:
    return Span(slot=span.sequence.slot, start=span.start, token_ids=span.sequence.token_ids[span.start : span.end])
