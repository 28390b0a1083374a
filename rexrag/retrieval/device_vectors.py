"""All vectors of an index in the memory of a GPU, searched exactly: faster than a CPU goes through a few lists."""

from __future__ import annotations

from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor

from rexrag.retrieval.encoder import Device, Vectors
from rexrag.retrieval.vectors import Rows, VectorSource

_MOVED_ROWS: Final = 1 << 16
_BLOCK_ROWS: Final = 1 << 20
"""Vectors that are multiplied at a time: their scores for a batch of queries are memory, too."""
_SPARE: Final = 32
"""Further candidates of the half-precise scores, which the precise ones put in order."""
_FREE_SHARE: Final = 0.8
"""Part of the memory at hand that vectors may take: encoder and scores need the rest."""


class DeviceVectors:
    """Vectors as fp16, 2 D bytes each.

    Scores are computed in fp16 for all of them, then again in float32 for the best.
    """

    def __init__(self, source: VectorSource, *, device: Device) -> None:
        """
        Raises:
            RuntimeError: the device has not enough memory, a value is beyond what fp16 holds, or the source does not
                give its vectors.
        """
        self.count = source.count
        blocks = source.blocks(_MOVED_ROWS)
        first = next(blocks)  # a source that does not give its vectors says so before memory is taken
        self._vectors = torch.empty(source.count, source.dimension, dtype=torch.float16, device=device)
        start = 0
        for block in chain([first], blocks):
            halves = torch.from_numpy(block).to(device).half()
            if not bool(halves.isfinite().all()):
                raise RuntimeError("a vector has a value beyond 65504, the largest of fp16")
            self._vectors[start : start + len(block)] = halves
            start += len(block)
        assert start == self.count, f"{start} of {self.count} vectors came"

    @torch.inference_mode()
    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """The best rows for each query by inner product, best first, at most `top_k`.

        Args:
            queries: float32[N, D].

        Returns:
            scores float32[N, K] and rows int64[N, K].
        """
        precise = torch.from_numpy(np.ascontiguousarray(queries)).to(self._vectors.device)
        # Of length 1 they rank the same, and no product exceeds what fp16 holds.
        directions = torch.nn.functional.normalize(precise, dim=1).half()
        rows = self._candidates(directions, min(self.count, top_k + _SPARE))
        scores = torch.einsum("nd,nkd->nk", precise, self._vectors[rows].float())
        best = scores.topk(min(self.count, top_k), dim=1)
        return best.values.cpu().numpy(), rows.gather(1, best.indices).cpu().numpy()

    def _candidates(self, queries: Tensor, wanted: int) -> Tensor:
        """Rows of the best half-precise scores, int64[N, K], in no order."""
        scores = torch.empty(len(queries), 0, dtype=queries.dtype, device=queries.device)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, self.count, _BLOCK_ROWS):
            block = self._vectors[start : start + _BLOCK_ROWS]
            best = (queries @ block.T).topk(min(wanted, len(block)), dim=1)
            scores, rows = torch.cat([scores, best.values], 1), torch.cat([rows, best.indices + start], 1)
            kept = scores.topk(min(wanted, scores.shape[1]), dim=1).indices
            scores, rows = scores.gather(1, kept), rows.gather(1, kept)
        return rows


def bytes_on_device(count: int, dimension: int) -> int:
    """What the vectors of an index take there."""
    return 2 * count * dimension


def room_on_gpu(share: float) -> int:
    """Bytes that vectors may take on this process's GPU, of which `share` is its own."""
    free, total = torch.cuda.mem_get_info()
    return int(_FREE_SHARE * min(free, share * total))
