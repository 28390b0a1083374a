"""A dense index in this process: vectors of passages in a FAISS file, memory-mapped, and the encoder of queries.

index/  index.json · offsets.u64 (where each row starts) · vectors.faiss · lists.faiss (of an `ivf` index)
        passages.jsonl (only for a parquet corpus, whose rows cannot be read singly)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from rexrag.errors import RetrievalIndexError, counted, first_line
from rexrag.retrieval.device_vectors import bytes_on_device, room_on_gpu
from rexrag.retrieval.encoder import Device, Encoder, Vectors
from rexrag.retrieval.faiss_files import FaissIndex, open_faiss, open_foreign, open_lists
from rexrag.retrieval.manifest import DenseEntry, Manifest, check_sizes, locate_file, read_manifest
from rexrag.retrieval.search import Effort, Searcher
from rexrag.retrieval.stored_passages import open_passages
from rexrag.types import Passage

VECTORS_NAME: Final = "vectors.faiss"
LISTS_NAME: Final = "lists.faiss"
LOG = logging.getLogger(__name__)


class DenseIndex:
    """Searches an index folder by vectors; a `BatchIndex`.

        index = DenseIndex(folder)
        found = index.find(index.prepare(["currency of Gabon"]), top_k=3)

    Passages of equal score (to six digits) come in the order of the corpus.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: str | Path | None = None,
        gpu_share: float = 0.0,
        num_threads: int | None = None,
    ) -> None:
        """Open an index; sizes are checked, hashes are not (`check_index`), but that of the encoder is.

        Args:
            encoder: where its encoder is now; without it, where it was.
            gpu_share: part of this process's GPU that is its own; 0: all is on the CPU. The encoder is put there, and
                the vectors where they find room, as fp16: then a search is exact, whatever the kind.
            num_threads: of each stage. Those of torch are set for the whole process. None leaves all as it is.

        Raises:
            RetrievalIndexError: no dense index there, a damaged one, a corpus that is missing or of another size, or
                another encoder.
            ModelError: the encoder is missing or cannot be loaded.
        """
        root = self._root = Path(folder)
        manifest = read_manifest(root)
        if manifest.dense is None:
            raise RetrievalIndexError(f'{root}: a bm25 index, no dense one; set retriever.kind = "bm25"')
        check_sizes(root, manifest)
        self._corpus = open_passages(root, manifest)
        self._searcher = open_searcher(root, manifest, num_threads=num_threads)
        if not self._searcher.count == len(self._corpus) == manifest.passages:
            raise RetrievalIndexError(
                f"{root}: {counted(self._searcher.count, 'vector')} and {counted(len(self._corpus), 'offset')} do not "
                f"fit the {manifest.passages} of its manifest; build it again"
            )
        self.manifest = manifest
        device: Device = "cuda" if gpu_share else "cpu"
        self.encoder = _load_encoder(root, manifest.dense, path=encoder, device=device, num_threads=num_threads)
        if gpu_share:
            _move_to_gpu(self._searcher, root, room=room_on_gpu(gpu_share))

    @property
    def num_passages(self) -> int:
        return len(self._corpus)

    def prepare(self, queries: Sequence[str]) -> list[Vectors]:
        """The vector of each query, float32[D].

        Raises:
            RetrievalIndexError: a vector is not finite.
        """
        return list(self.encoder.queries(queries))

    def find(self, prepared: Sequence[Vectors], *, top_k: int) -> list[tuple[Passage, ...]]:
        """For each query the best passages, best first, at most `top_k`, fewer where the corpus has fewer.

        Raises:
            RetrievalIndexError: the corpus changed under the index.
        """
        assert top_k >= 1, f"top_k must be at least 1, got {top_k}"
        if not prepared:
            return []
        scores, rows = self._searcher.search(np.stack(prepared), top_k)
        if (most := int(rows.max())) >= len(self._corpus):
            raise RetrievalIndexError(
                f"{self._root}: a search found row {most} of {len(self._corpus)}: its vectors are damaged; compare "
                "them with `rexrag index check`, or build it again"
            )
        return [self._passages(*result) for result in zip(scores, rows, strict=True)]

    def _passages(self, scores: Vectors, rows: npt.NDArray[np.int64]) -> tuple[Passage, ...]:
        return tuple(
            replace(self._corpus.get(row), score=score)
            for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
            if row >= 0
        )

    def close(self) -> None:
        self._corpus.close()


def _move_to_gpu(searcher: Searcher, folder: Path, *, room: int) -> None:
    wanted = bytes_on_device(searcher.count, searcher.dimension)
    if wanted > room:
        LOG.warning(
            "%s: its vectors would take %.1f GB of the GPU, where %.1f GB are left for them: they are searched on the "
            "CPU; give a larger share of a GPU, or one with more memory",
            folder,
            wanted / 1e9,
            room / 1e9,
        )
        return
    try:
        searcher.move_to("cuda")
    except RuntimeError as error:
        LOG.warning("%s: its vectors are searched on the CPU, not the GPU: %s", folder, first_line(error))


def open_searcher(folder: Path, manifest: Manifest, *, num_threads: int | None = None) -> Searcher:
    """The vectors of an index folder.

    Raises:
        RetrievalIndexError: the file is missing, damaged, or of another dimension.
    """
    dense = manifest.dense
    assert dense is not None, "a dense index has its entry"
    index = open_vectors(folder) if dense.file is None else open_foreign(locate_file(folder, dense.file))
    if index.d != dense.encoder.dimension:
        raise RetrievalIndexError(
            f"{folder}: its vectors have {counted(index.d, 'dimension')}, those of its encoder "
            f"{dense.encoder.dimension}; build the index again"
        )
    effort = None if dense.probes is None else Effort(probes=dense.probes, candidates=dense.candidates)
    return Searcher(index, effort=effort, num_threads=num_threads)


def open_vectors(folder: Path) -> FaissIndex:
    """The FAISS index of an index folder: its vectors, and where it has lists those in front of them.

    Raises:
        RetrievalIndexError: a file is missing, damaged, or one of another index.
    """
    vectors, lists = open_faiss(folder / VECTORS_NAME), folder / LISTS_NAME
    return open_lists(lists, vectors) if lists.exists() else vectors


def _load_encoder(
    folder: Path, dense: DenseEntry, *, path: str | Path | None, device: Device, num_threads: int | None
) -> Encoder:
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    entry = dense.encoder
    encoder = Encoder.load(path or entry.path, settings=entry.settings, device=device)
    if encoder.sha256 != entry.sha256:
        raise RetrievalIndexError(
            f"{folder}: the encoder {encoder.folder} is not the one of this index (sha256 {encoder.sha256[:12]}…, not "
            f"{entry.sha256[:12]}…); name the right one with --encoder, or build the index again"
        )
    return encoder
