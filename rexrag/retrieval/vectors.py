"""Vectors of passages on their way into an index: a file that grows while a corpus is encoded, or another's index."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

import faiss
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from rexrag.data.corpus import Corpus
from rexrag.errors import RetrievalIndexError
from rexrag.files import write_atomic
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderSettings
from rexrag.retrieval.faiss_files import FaissIndex

Rows = npt.NDArray[np.int64]

_CHUNK: Final = 1024
"""Passages that are encoded, and kept, at a time: what a kill loses at most."""


class VectorSource(Protocol):
    """Vectors by row, of which a part is in memory at a time."""

    @property
    def count(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def blocks(self, size: int) -> Iterator[Vectors]:
        """All vectors in order, float32[≤ size, D] each."""

    def take(self, rows: Sequence[int] | Rows) -> Vectors:
        """Single ones, float32[len(rows), D]."""


class FaissVectors:
    """The vectors of a FAISS index, decoded; one with lists needs its direct map."""

    def __init__(self, index: FaissIndex) -> None:
        self._index = index
        self.count = int(index.ntotal)
        self.dimension = int(index.d)
        self._has_lists = faiss.try_extract_index_ivf(index) is not None

    def blocks(self, size: int) -> Iterator[Vectors]:
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            # An index with lists would go through all of its ids for each block.
            yield (
                self.take(np.arange(start, start + rows)) if self._has_lists else self._index.reconstruct_n(start, rows)
            )

    def take(self, rows: Sequence[int] | Rows) -> Vectors:
        vectors: Vectors = self._index.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return vectors


class VectorOrigin(BaseModel):
    """What the vectors in a file are of: with another origin they are of no use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus_sha256: str
    encoder_sha256: str
    settings: EncoderSettings
    dimension: int
    dtype: Literal["float16", "float32"]


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: VectorOrigin
    rows: int


class VectorStore:
    """A folder beside the index that is built, with the vectors encoded so far; a build that was killed goes on there.

    folder/  state.json (whose vectors, how many of them are durable) · vectors (row after row)
    """

    def __init__(self, folder: Path, origin: VectorOrigin) -> None:
        """Open what there is of the same origin, or begin anew.

        Raises:
            RetrievalIndexError: another build is at work there.
        """
        self._folder = folder
        self._origin = origin
        self._path = folder / "vectors"
        self.dimension = origin.dimension
        self._dtype = np.dtype(origin.dtype)
        self._row_bytes = self._dtype.itemsize * origin.dimension
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self.count = self._durable_rows()
        # Rows that were written and not yet counted are written again.
        self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        self._file.truncate(self.count * self._row_bytes)
        self._file.seek(0, os.SEEK_END)

    def _durable_rows(self) -> int:
        try:
            state = _State.model_validate_json((self._folder / "state.json").read_bytes())
            whole = self._path.stat().st_size // self._row_bytes
        except (OSError, ValidationError):
            return 0
        return state.rows if state.origin == self._origin and state.rows <= whole else 0

    def append(self, vectors: Vectors) -> None:
        """Keep further vectors, float32[N, D], durably.

        Raises:
            RetrievalIndexError: a value is beyond what the file's type holds.
            OSError: the disk is full.
        """
        with np.errstate(over="ignore"):
            stored = vectors.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise RetrievalIndexError(
                "a vector has a value beyond 65504, the largest of fp16; let vectors be normalised (--normalize), or "
                "keep them as --precision fp32"
            )
        self._file.write(stored.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count += len(stored)
        write_atomic(self._folder / "state.json", _State(origin=self._origin, rows=self.count).model_dump_json())

    def blocks(self, size: int) -> Iterator[Vectors]:
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            block = np.fromfile(
                self._path, dtype=self._dtype, count=rows * self.dimension, offset=start * self._row_bytes
            )
            yield block.reshape(rows, self.dimension).astype(np.float32)

    def take(self, rows: Sequence[int] | Rows) -> Vectors:
        mapped = np.memmap(self._path, dtype=self._dtype, mode="r", shape=(self.count, self.dimension))
        taken: Vectors = mapped[np.asarray(rows)].astype(np.float32)
        return taken

    def close(self) -> None:
        self._file.close()
        os.close(self._lock)


def encode_corpus(
    corpus: Corpus, encoder: Encoder, store: VectorStore, *, progress: Callable[[int], None] | None = None
) -> None:
    """Put the vectors of all passages that are not there yet into the store.

    Args:
        progress: called with the number of passages behind.
    """
    for start in range(store.count, len(corpus), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(corpus)))
        store.append(encoder.passages([corpus.get(row) for row in rows]))
        if progress is not None:
            progress(rows.stop)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RetrievalIndexError(
            f"{folder}: another build is at work there; wait for it, or choose another --out"
        ) from error
    return descriptor
