"""Vectors of passages on their way into an index: a file that grows while a corpus is encoded, or another's index."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import faiss
import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from rexrag.data.corpus import Corpus
from rexrag.errors import RetrievalIndexError
from rexrag.files import write_atomic
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderSettings
from rexrag.retrieval.faiss_files import FaissIndex

LOG = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Decode: TypeAlias = Callable[[int, Vectors], object]

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
    """The vectors of a FAISS index, decoded; of one that refines, those by which it does.

    Raises:
        RuntimeError: here or later: the index does not give its vectors back.
    """

    def __init__(self, index: FaissIndex) -> None:
        self._owner = index
        self._index = faiss.downcast_index(index.refine_index) if isinstance(index, faiss.IndexRefine) else index
        self.count = int(index.ntotal)
        self.dimension = int(index.d)
        self._decode = decoder_of(self._index)
        lists = faiss.try_extract_index_ivf(self._index)
        self._has_lists = lists is not None
        if lists is not None:
            lists.make_direct_map()

    def blocks(self, size: int) -> Iterator[Vectors]:
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            if self._has_lists:  # else it would go through all of its ids for each block
                yield self.take(np.arange(start, start + rows))
            elif self._decode is not None:
                block = np.empty((rows, self.dimension), dtype=np.float32)
                self._decode(start, block)
                yield block
            else:
                yield self._index.reconstruct_n(start, rows)

    def take(self, rows: Sequence[int] | Rows) -> Vectors:
        vectors: Vectors = self._index.reconstruct_batch(np.asarray(rows, dtype=np.int64))
        return vectors


def decoder_of(index: FaissIndex) -> Decode | None:
    """What writes the vectors of an index from a row on into an array; None: its vectors are not coded one by one."""
    if not isinstance(index, faiss.IndexScalarQuantizer):
        return None
    if index.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
        return lambda start, out: index.reconstruct_n(start, len(out), out)
    # FAISS and numpy decode halves one by one, in six times the time.
    codes = faiss.rev_swig_ptr(index.codes.data(), index.codes.size()).view(np.float16)
    halves = torch.from_numpy(codes.reshape(index.ntotal, index.d))
    return lambda start, out: torch.from_numpy(out).copy_(halves[start : start + len(out)])


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
    except BlockingIOError as error:
        os.close(descriptor)
        raise RetrievalIndexError(
            f"{folder}: another build is at work there; wait for it, or choose another --out"
        ) from error
    except OSError:  # some file systems have no locks
        LOG.warning("%s: this file system has no locks; let no other build write there", folder)
    return descriptor
