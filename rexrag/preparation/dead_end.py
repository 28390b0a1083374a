"""How deep a dead end is: how likely the policy goes on by itself where it has learnt to answer.

Demonstrations that go on mark the place with a segment of its own, the tag that opens the second thought.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from transformers import PreTrainedModel

from rexrag.data.demonstrations import GOING_ON, Demonstration
from rexrag.env.codec import Codec
from rexrag.errors import counted
from rexrag.model.logprobs import token_logprobs
from rexrag.model.packing import PackRow, pack

_ALTERNATIVES: Final = {"answer": "<answer>", "think": GOING_ON, "search": "<search>"}
_BUDGET_TOKENS: Final = 2048


@dataclass(frozen=True, kw_only=True)
class DeadEndDepth:
    """Probabilities at the decision after the first search, over `num_contexts` questions of more than one hop.

    Attributes:
        answer_mean: of answering at once.
        think_median, think_mean: of one more thought.
        search_median, search_mean: of a search without one.
    """

    num_contexts: int
    answer_mean: float
    think_median: float
    think_mean: float
    search_median: float
    search_mean: float

    def __str__(self) -> str:
        return (
            f"after the first search it answers with probability {self.answer_mean:.3f}, goes on with "
            f"{self.think_median:.1e} by a thought and {self.search_median:.1e} by a search (medians of "
            f"{counted(self.num_contexts, 'question')})"
        )


def measure_depth(
    model: PreTrainedModel,
    demonstrations: Sequence[Demonstration],
    *,
    codec: Codec,
    render: Callable[[str], list[int]],
    max_contexts: int = 40,
) -> DeadEndDepth | None:
    """One forward pass per context; None where no demonstration goes on.

    Args:
        model: uses packed attention.
        render: prompt ids of a question.
    """
    contexts = [ids for one in demonstrations if (ids := _context(one, codec=codec, render=render)) is not None]
    if not contexts:
        return None
    contexts = contexts[:max_contexts]
    probabilities = {name: _probabilities(model, contexts, codec.encode(tag)) for name, tag in _ALTERNATIVES.items()}
    return DeadEndDepth(
        num_contexts=len(contexts),
        answer_mean=statistics.fmean(probabilities["answer"]),
        think_median=statistics.median(probabilities["think"]),
        think_mean=statistics.fmean(probabilities["think"]),
        search_median=statistics.median(probabilities["search"]),
        search_mean=statistics.fmean(probabilities["search"]),
    )


def _context(demonstration: Demonstration, *, codec: Codec, render: Callable[[str], list[int]]) -> list[int] | None:
    """All tokens before the decision, None for a demonstration without one."""
    ids = render(demonstration.question)
    for segment in demonstration.segments:
        if segment.text == GOING_ON:
            return ids
        ids += codec.encode(segment.text)
    return None


def _probabilities(model: PreTrainedModel, contexts: Sequence[list[int]], tag: list[int]) -> list[float]:
    rows = [
        PackRow(
            token_ids=np.asarray(context + tag, np.int32),
            trained=np.arange(len(context), len(context) + len(tag), dtype=np.int64),
            group=0,
        )
        for context in contexts
    ]
    found: list[float] = []
    for batch in pack(rows, budget=_BUDGET_TOKENS, device=model.device):
        logprobs = token_logprobs(model, batch).view(len(batch.rows), len(tag))
        found += [math.exp(value) for value in logprobs.sum(dim=1).tolist()]
    return found
