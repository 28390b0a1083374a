"""Searches of a FAISS index in batches: exact scans go through blocks of decoded vectors, so that BLAS multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import faiss
import numpy as np

from rexrag.retrieval.device_vectors import DeviceVectors
from rexrag.retrieval.encoder import Device, Vectors
from rexrag.retrieval.faiss_files import FaissIndex
from rexrag.retrieval.vectors import Decode, FaissVectors, Rows, decoder_of

SCAN_FROM: Final = 8
"""Queries of a batch from which decoding the vectors once for all of them is faster than once for each."""
_BLOCK_BYTES: Final = 1 << 21
"""Decoded vectors at a time: what stays in a core's cache between decoding and multiplying."""
_LEAST_FACTOR: Final = 4.0
"""Candidates for each result, where so many are asked for that the measured number would be too few."""
_TIES: Final = 13
"""Further results that are fetched, so that equal scores at the end of the list are put into one order."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a search of an index with lists looks at.

    Attributes:
        probes: lists that are looked through.
        candidates: where the lists have coarse codes, vectors that are compared themselves.
    """

    probes: int
    candidates: int | None = None


class Searcher:
    """Vectors of passages, searched by inner product, or by distance in an index that was made so."""

    def __init__(self, index: FaissIndex, *, effort: Effort | None = None, num_threads: int | None = None) -> None:
        """
        Args:
            effort: of an index that has lists; None: as it comes.
            num_threads: of a search.
        """
        self.index = index
        self.count = int(index.ntotal)
        self.dimension = int(index.d)
        self._num_threads = num_threads
        self.is_l2 = index.metric_type == faiss.METRIC_L2
        self._decode = decoder_of(index)
        # As FAISS comes (128,000 for queries times dimensions), batches of up to hundreds of queries go the slow way.
        faiss.cvar.distance_compute_blas_threshold = 3 * index.d
        self._candidates: int | None = None
        self._on_device: DeviceVectors | None = None
        if effort is not None:
            self.set_effort(effort)

    @property
    def num_lists(self) -> int | None:
        """None for an index without lists."""
        lists = faiss.try_extract_index_ivf(self.index)
        return None if lists is None else int(lists.nlist)

    @property
    def has_candidates(self) -> bool:
        """Whether the lists have coarse codes, and vectors beside them."""
        return isinstance(self.index, faiss.IndexRefine)

    def move_to(self, device: Device) -> None:
        """Search exactly on a device from now on, whatever the kind of index.

        Raises:
            RuntimeError: the index does not give its vectors back, or the device has no room for them.
        """
        self._on_device = DeviceVectors(FaissVectors(self.index), device=device)

    def set_effort(self, effort: Effort) -> None:
        """Look at so much from now on; the index must have lists."""
        lists = faiss.try_extract_index_ivf(self.index)
        assert lists is not None, "an index with lists"
        lists.nprobe = effort.probes
        self._candidates = effort.candidates

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """The best rows for each query, best first, at most `top_k`; -1 where there are no more.

        Args:
            queries: float32[N, D].

        Returns:
            scores float32[N, K], higher is better (of an L2 index of unit vectors: their inner product), and rows
            int64[N, K].
        """
        if self._num_threads is not None:
            faiss.omp_set_num_threads(self._num_threads)
        fetched = min(top_k + _TIES, self.count)
        if self._on_device is not None:
            return _ordered(*self._on_device.search(queries, fetched), top_k)
        if self._decode is not None and len(queries) >= SCAN_FROM:
            scores, rows = self._scan(queries, fetched, self._decode)
        else:
            if self._candidates is not None:
                self.index.k_factor = max(_LEAST_FACTOR, self._candidates / fetched)
            scores, rows = self.index.search(np.ascontiguousarray(queries), fetched)
            self._fill_up(queries, scores, rows, min(top_k, self.count))
        if self.is_l2:
            scores = (1 - scores / 2).astype(np.float32)
        return _ordered(scores, rows, top_k)

    def _fill_up(self, queries: Vectors, scores: Vectors, rows: Rows, top_k: int) -> None:
        """Search everything for the queries whose few lists have less than `top_k` vectors."""
        short = np.flatnonzero(rows[:, top_k - 1] < 0)
        if self.num_lists is None or not len(short):
            return
        if self.has_candidates:
            scores[short], rows[short] = self.index.refine_index.search(queries[short], rows.shape[1])
        else:
            everywhere = faiss.SearchParametersIVF(nprobe=self.num_lists)  # type: ignore[call-arg]  # SWIG's
            scores[short], rows[short] = self.index.search(queries[short], rows.shape[1], params=everywhere)

    def _scan(self, queries: Vectors, top_k: int, decode: Decode) -> tuple[Vectors, Rows]:
        metric = self.index.metric_type
        best = faiss.ResultHeap(len(queries), top_k, keep_max=not self.is_l2)
        block = max(1, _BLOCK_BYTES // (4 * self.index.d))
        decoded = np.empty((block, self.index.d), dtype=np.float32)
        for start in range(0, self.count, block):
            vectors = decoded[: min(block, self.count - start)]
            decode(start, vectors)
            scores, rows = faiss.knn(queries, vectors, min(top_k, len(vectors)), metric)
            best.add_result(scores, rows + start)
        best.finalize()
        return best.D, best.I


def _ordered(scores: Vectors, rows: Rows, top_k: int) -> tuple[Vectors, Rows]:
    """By falling score, to about six digits, and where it is equal by row; missing ones last."""
    rounded: Vectors = np.round(np.where(rows < 0, np.float32(-np.inf), scores), 6).astype(np.float32)
    order = np.lexsort((rows, -rounded), axis=-1)[:, :top_k]
    return np.take_along_axis(scores, order, axis=-1), np.take_along_axis(rows, order, axis=-1)
