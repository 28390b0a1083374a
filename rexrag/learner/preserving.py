"""What the policy gets right is kept: rows of solved groups whose likelihood may not fall (§7).

A group that is all right has no advantage, so nothing holds the policy there while other questions pull it elsewhere.
A sample of such rows is kept from the whole run. Each step that updates the policy takes out of its gradient what would
make some of them less likely, and raises again what has become so.

Legend: E trained tokens of all rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from rexrag.learner.ranks import Ranks
from rexrag.learner.shapes import require_length, require_shape
from rexrag.model.packing import PackRow
from rexrag.model.sharding import shard_of
from rexrag.types import FloatArray, IntArray, Origin, Trajectory, TrajectoryGroup

KEPT_ROWS: Final = 64
"""Rows that are kept; a few of each step suffice, since the penalty is 0 where the policy has not moved."""
SURE: Final = 0.9
"""Probability from which on a token is kept: what the policy decides, not which of several words it takes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreservedRow:
    """A right row: its tokens, those of them that the policy was sure of [E], and how likely they were [E]."""

    token_ids: IntArray
    trained: IntArray
    logprob: FloatArray

    @classmethod
    def of(cls, trajectory: Trajectory) -> PreservedRow:
        is_sure = trajectory.behavior_logprob >= math.log(SURE)
        trained = np.flatnonzero((trajectory.origin == Origin.POLICY) & is_sure).astype(np.int32)
        return cls(
            token_ids=trajectory.token_ids.copy(),
            trained=trained,
            logprob=trajectory.behavior_logprob[trained].copy(),
        )


class PreservingSet:
    """A uniform sample of the solved groups of the run so far, one row of each (reservoir sampling, Vitter 1985).

    Lifecycle, per step: `draw` what is trained, then `add` the step's groups.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.rows: list[PreservedRow] = []
        self.num_seen = 0
        self._seed = seed

    def add(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Offer a row of each group whose rows, masked ones left out, are all right."""
        for group in groups:
            counted = [row for row in group.trajectories if not row.is_masked]
            if not counted or not all(row.correct for row in counted):
                continue
            row = PreservedRow.of(counted[0])
            if not len(row.trained):
                continue
            self.num_seen += 1
            # Seeded by what was seen, not by a generator's state: a resumed run goes on alike.
            place = Random(f"{self._seed} keep {self.num_seen}").randrange(self.num_seen)
            if len(self.rows) < KEPT_ROWS:
                self.rows.append(row)
            elif place < KEPT_ROWS:
                self.rows[place] = row

    def tensors(self) -> dict[str, Tensor]:
        """The kept rows one after the other, for a checkpoint."""
        lengths = [(len(row.token_ids), len(row.trained)) for row in self.rows]
        return {
            "lengths": torch.tensor(lengths, dtype=torch.int64).reshape(-1, 2),
            "token_ids": _joined([row.token_ids for row in self.rows], torch.int32),
            "trained": _joined([row.trained for row in self.rows], torch.int32),
            "logprob": _joined([row.logprob for row in self.rows], torch.float32),
        }

    def load(self, tensors: Mapping[str, Tensor], *, num_seen: int) -> None:
        """The inverse of `tensors`."""
        token_lengths, trained_lengths = tensors["lengths"].T.tolist()
        columns = [
            torch.split(tensors["token_ids"], token_lengths),
            torch.split(tensors["trained"], trained_lengths),
            torch.split(tensors["logprob"], trained_lengths),
        ]
        self.rows = [
            PreservedRow(token_ids=ids.numpy(), trained=trained.numpy(), logprob=logprob.numpy())
            for ids, trained, logprob in zip(*columns, strict=True)
        ]
        self.num_seen = num_seen

    def draw(self, num: int, *, step: int) -> list[PreservedRow]:
        """At most `num` different rows for a step."""
        return Random(f"{self._seed} draw {step}").sample(self.rows, min(num, len(self.rows)))


def _joined(arrays: Sequence[npt.NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(torch.tensor(array, dtype=dtype) for array in arrays)])


def pack_rows(rows: Sequence[PreservedRow]) -> list[PackRow]:
    """Each with a group of its own: they share nothing."""
    return [
        PackRow(token_ids=row.token_ids, trained=row.trained.astype(np.int64), group=i) for i, row in enumerate(rows)
    ]


def decrease_penalty(logprob: Tensor, *, kept_logprob: Tensor, knee: float) -> Tensor:
    """[E] What each token has lost since its row was kept, d = max(0, log π_kept − log π_θ) (§7).

    Args:
        knee: κ in nats; above 0 the penalty is Huber's (1964), d²/(2κ) up to κ and d − κ/2 beyond.

    Raises:
        ValueError: the shapes differ, or κ is below 0.
    """
    require_shape(logprob, name="logprob", kept_logprob=kept_logprob)
    if not (math.isfinite(knee) and knee >= 0.0):
        raise ValueError(f"knee is {knee}, it must be finite and at least 0")
    fall = torch.relu(kept_logprob - logprob)
    return huber_loss(fall, torch.zeros_like(fall), reduction="none", delta=knee) / knee if knee else fall


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """[P] The gradients at hand, which the parameters no longer have."""
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


def join_gradients(
    parameters: Sequence[nn.Parameter], *, objective: Sequence[Tensor | None], ranks: Ranks | None = None
) -> float | None:
    """Join the parameters' gradient q, of the penalty, with that of the objective, g, in place (§7):

        g − min(0, g·q)/‖q‖² · q  +  min(1, ‖g‖/‖q‖) · q

    The first two terms are the projection of A-GEM (Chaudhry et al. 2019, arXiv 1812.00420, equation 11): to first
    order a step along them does not raise the penalty. The third lowers it, with at most the objective's own size, or
    giving back would be the whole of a step that is clipped.

    Args:
        ranks: that hold the parameters in shards; None: they are whole.

    Returns: the cosine between g and q; None where one of them is 0, where g alone is left.

    Raises:
        ValueError: not one gradient for each parameter.
    """
    require_length(len(parameters), {"objective": objective}, name="parameters")
    ranks = ranks or Ranks()
    pairs = [(_shard(g), _shard(p.grad)) for p, g in zip(parameters, objective, strict=True)]
    norm, penalty_norm = ranks.norm(_norm([g for g, _ in pairs])), ranks.norm(_norm([q for _, q in pairs]))
    if not norm or not penalty_norm:
        for p, g in zip(parameters, objective, strict=True):
            p.grad = g
        return None
    dot = ranks.sum(
        sum(float(torch.dot(g.flatten(), q.flatten())) for g, q in pairs if g is not None and q is not None)
    )
    factor = min(1.0, norm / penalty_norm) - min(0.0, dot) / penalty_norm**2
    for p, g in zip(parameters, objective, strict=True):
        if p.grad is not None:
            p.grad.mul_(factor)
        if g is not None:
            p.grad = g if p.grad is None else p.grad.add_(g)
    return dot / (norm * penalty_norm)


def _shard(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else shard_of(gradient)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))
