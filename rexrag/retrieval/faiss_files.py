"""FAISS files: opened memory-mapped and checked, and written in a stream, since FAISS itself needs all in memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import faiss
import numpy as np

from rexrag.errors import RetrievalIndexError, first_line
from rexrag.retrieval.encoder import Vectors

FaissIndex: TypeAlias = Any
"""A `faiss.Index`: what SWIG makes of it has no types worth the name."""
Precision = Literal["fp32", "fp16", "int8"]

_NTOTAL_AT: Final = 8
"""Byte at which the header of an index file has its number of vectors: behind four letters and the dimension."""

# As FAISS comes, batches of 8 to 256 queries go the slow way: it compares queries times dimensions with 128,000.
faiss.cvar.distance_compute_blas_threshold = 1024


def open_faiss(path: Path) -> FaissIndex:
    """Open an index file, its vectors memory-mapped where its kind allows it.

    Raises:
        RetrievalIndexError: no FAISS index, a damaged one, or one of a newer version.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR)
    except (RuntimeError, MemoryError) as error:
        raise RetrievalIndexError(
            f"{path}: no FAISS index that version {faiss.__version__} reads ({_reason(error)}); write it anew with "
            "faiss.write_index"
        ) from error


def _reason(error: BaseException) -> str:
    """What FAISS says, without the place in its source."""
    return first_line(error).rpartition("Error: ")[2].strip() or type(error).__name__


def empty_flat(dimension: int, precision: Precision, *, limits: Vectors | None = None) -> FaissIndex:
    """An index without vectors yet that searches all of them.

    Args:
        limits: float32[2, D], the least and the largest value of each dimension; int8 spreads its codes between them.
    """
    if precision == "fp32":
        return faiss.IndexFlatIP(dimension)
    kind = faiss.ScalarQuantizer.QT_fp16 if precision == "fp16" else faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexScalarQuantizer(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(np.zeros((2, dimension), dtype=np.float32) if limits is None else limits)
    return index


def write_flat(path: Path, empty: FaissIndex, blocks: Iterator[Vectors], *, count: int) -> None:
    """Write a flat index of `count` vectors that come in blocks; a block is in memory at a time.

    A file of this kind is the header of an index without vectors, then the codes, one after another.
    """
    header = bytearray(faiss.serialize_index(empty).tobytes())
    assert header[-8:] == bytes(8), "the header of an empty index ends with the size of its codes, 0"
    unit = 4 if isinstance(empty, faiss.IndexFlat) else 1  # sizes of codes are in floats there, else in bytes
    struct.pack_into("<q", header, _NTOTAL_AT, count)
    struct.pack_into("<Q", header, len(header) - 8, count * empty.code_size // unit)
    written = 0
    with path.open("wb") as file:
        file.write(header)
        for block in blocks:
            file.write(empty.sa_encode(block))
            written += len(block)
    assert written == count, f"{written} of {count} vectors came"
    opened = open_faiss(path)
    assert opened.ntotal == count, "FAISS reads what was written"
