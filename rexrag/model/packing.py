"""Rows packed into micro-batches by a token budget, each shared prefix computed once.

Rows of a group begin with the same prompt, and a probe with its parent's tokens. A packed row brings only the
tokens that follow its longest common prefix with an earlier row of its group in the micro-batch; its attention
reads the prefix where that row left it. A token's hidden state depends on the tokens before it alone, so losses
and gradients are those of separate rows.

Legend: P packed tokens, R rows, E trained tokens, K key positions of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.model.attention import PackedLayout
from rexrag.types import IntArray

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackRow:
    """One row: all its tokens, the ascending indices of those that carry loss, and whom it may share with.

    Attributes:
        token_ids: [T].
        trained: indices into token_ids, each at least 1 (the first token is predicted by nothing).
        group: rows of one group may share a prefix.
    """

    token_ids: IntArray
    trained: IndexArray
    group: int

    def __post_init__(self) -> None:
        if len(self.trained) == 0 or self.trained[0] < 1 or self.trained[-1] >= len(self.token_ids):
            raise ValueError(f"trained indices must lie in [1, {len(self.token_ids)}) and there must be one")

    @property
    def inputs(self) -> IntArray:
        """The tokens that a forward pass needs: those before the last trained one."""
        return self.token_ids[: int(self.trained[-1])]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """One micro-batch.

    Attributes:
        rows: [R] indices of the packed rows.
        token_ids, position_ids: [P].
        layout: how attention reads them.
        logit_index: [E] packed position whose hidden state predicts the trained token, row after row.
        targets: [E] the trained tokens.
        num_row_tokens: tokens that the rows would take without sharing.
    """

    rows: tuple[int, ...]
    token_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    logit_index: Tensor
    targets: Tensor
    num_row_tokens: int


def pack(rows: Sequence[PackRow], *, budget: int, device: torch.device | None = None) -> list[PackedBatch]:
    """Rows in the given order cut into micro-batches of at most `budget` packed tokens.

    A row longer than the budget has a micro-batch of its own. Rows of a group should be neighbours, so that they
    share what they have in common.
    """
    batches: list[PackedBatch] = []
    builder = _Builder()
    for index, row in enumerate(rows):
        prefix = builder.shared_prefix(row)
        if builder.rows and builder.num_tokens + len(row.inputs) - len(prefix) > budget:
            batches.append(builder.finish(device))
            builder = _Builder()
            prefix = np.empty(0, np.int64)
        builder.add(index, row, prefix)
    if builder.rows:
        batches.append(builder.finish(device))
    return batches


class _Builder:
    """A micro-batch in the making."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.num_tokens = 0
        self._packed: list[PackRow] = []
        self._places: list[IndexArray] = []
        self._new: list[int] = []

    def shared_prefix(self, row: PackRow) -> IndexArray:
        """Packed positions of the longest prefix that an earlier row of the group has in common."""
        best = np.empty(0, np.int64)
        for other, places in zip(self._packed, self._places, strict=True):
            if other.group == row.group:
                length = _common_prefix(other.inputs, row.inputs)
                if length > len(best):
                    best = places[:length]
        return best

    def add(self, index: int, row: PackRow, prefix: IndexArray) -> None:
        num_new = len(row.inputs) - len(prefix)
        self.rows.append(index)
        self._packed.append(row)
        self._places.append(np.concatenate([prefix, np.arange(self.num_tokens, self.num_tokens + num_new)]))
        self._new.append(num_new)
        self.num_tokens += num_new

    def finish(self, device: torch.device | None) -> PackedBatch:
        tokens, positions = [], []
        for row, num_new in zip(self._packed, self._new, strict=True):
            length = len(row.inputs)
            tokens.append(row.inputs[length - num_new :])
            positions.append(np.arange(length - num_new, length))
        pairs = list(zip(self._packed, self._places, strict=True))
        logit_index = np.concatenate([places[row.trained - 1] for row, places in pairs])
        targets = np.concatenate([row.token_ids[row.trained] for row in self._packed])

        def tensor(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(device)

        return PackedBatch(
            rows=tuple(self.rows),
            token_ids=tensor(np.concatenate(tokens)),
            position_ids=tensor(np.concatenate(positions)),
            layout=PackedLayout.build(num_new=self._new, key_places=self._places, device=device),
            logit_index=tensor(logit_index),
            targets=tensor(targets),
            num_row_tokens=sum(len(row.inputs) for row in self._packed),
        )


def _common_prefix(a: IntArray, b: IntArray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
