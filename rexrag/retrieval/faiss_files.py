"""FAISS files: opened memory-mapped and checked, and written in a stream, since FAISS itself needs all in memory."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist, get_invlist_sizes

from rexrag.errors import RetrievalIndexError, first_line
from rexrag.retrieval.encoder import Vectors

FaissIndex: TypeAlias = Any
"""A `faiss.Index`: what SWIG makes of it has no types worth the name."""
Precision = Literal["fp32", "fp16", "int8"]

_WITH_LISTS: Final = b"Iw"
"""First letters of a file with lists: those are mapped in another way."""
_LISTS: Final = b"ilar"
_ALL_SIZES: Final = b"full"
_NTOTAL_AT: Final = 8
"""Byte at which the header of an index file has its number of vectors: behind four letters and the dimension."""


def open_faiss(path: Path) -> FaissIndex:
    """Open an index file, its vectors memory-mapped where its kind allows it.

    Raises:
        RetrievalIndexError: no FAISS index, a damaged one, or one of a newer version.
    """
    try:
        with path.open("rb") as file:
            has_lists = file.read(len(_WITH_LISTS)) == _WITH_LISTS
        flags = faiss.IO_FLAG_MMAP if has_lists else faiss.IO_FLAG_MMAP_IFC
        index = faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY)
    except OSError as error:
        raise RetrievalIndexError(f"{path}: cannot be read ({error.strerror}); name a FAISS file") from error
    except (RuntimeError, MemoryError) as error:
        raise RetrievalIndexError(
            f"{path}: no FAISS index that version {faiss.__version__} reads ({_reason(error)}); write it anew with "
            "faiss.write_index"
        ) from error
    if (lists := faiss.try_extract_index_ivf(index)) is not None and lists.invlists is not None:
        on_disk = faiss.downcast_InvertedLists(lists.invlists)
        if isinstance(on_disk, faiss.OnDiskInvertedLists):
            on_disk.prefetch_nthread = 0  # a search would start threads only to touch pages
    return index


def open_foreign(path: Path) -> FaissIndex:
    """Open an index file made elsewhere: of one that only gives ids the index inside, if they are the rows in order.

    Raises:
        RetrievalIndexError: as `open_faiss`, or they are others.
    """
    index = open_faiss(path)
    if not isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        return index
    ids = faiss.vector_to_array(index.id_map)
    if not np.array_equal(ids, np.arange(len(ids))):
        raise RetrievalIndexError(
            f"{path}: its vectors have ids of their own ({ids[:3].tolist()} …), and the rows of the corpus in their "
            "order are needed; write it anew without IndexIDMap"
        )
    inner: FaissIndex = faiss.downcast_index(index.index)
    inner.referenced_objects = [index]  # which owns it, and so has to live as long
    return inner


def open_lists(path: Path, vectors: FaissIndex) -> FaissIndex:
    """Lists of 4-bit codes, and the vectors that put their candidates in order, as one index.

    The codes are copied into the order in which FAISS compares many at once, and stay in memory.

    Args:
        vectors: of the same rows; int8, memory-mapped.

    Raises:
        RetrievalIndexError: the file is missing, damaged, or of other vectors.
    """
    stored = open_faiss(path)
    if not isinstance(stored, faiss.IndexIVFPQ) or (stored.ntotal, stored.d) != (vectors.ntotal, vectors.d):
        raise RetrievalIndexError(f"{path}: no lists of the vectors beside it; build the index again")
    if not _has_all_rows(stored):  # FAISS would read past the end of the vectors
        raise RetrievalIndexError(f"{path}: its rows are not those of the vectors; build the index again")
    packed = faiss.IndexIVFPQFastScan(stored)
    index: FaissIndex = faiss.IndexRefine(packed, vectors)
    index.referenced_objects = [packed, vectors, stored]  # of which it has no copies
    return index


def _has_all_rows(index: FaissIndex) -> bool:
    """Whether an index with lists has as many vectors as it says, with their rows as ids."""
    count = 0
    for i in range(index.nlist):
        rows, _ = get_invlist(index.invlists, i)  # type: ignore[no-untyped-call]
        if len(rows) and not 0 <= rows.min() <= rows.max() < index.ntotal:
            return False
        count += len(rows)
    return count == int(index.ntotal)


def _reason(error: BaseException) -> str:
    """What FAISS says, without the place in its source."""
    said = re.sub(r"Error in .*? at \S+:\d+: (?:Error: )?", "", first_line(error)).strip()
    return said or type(error).__name__


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


def write_lists(path: Path, empty: FaissIndex, parts: Sequence[FaissIndex]) -> None:
    """Write an index with lists from parts of its vectors; a list is in memory at a time.

    A file of this kind is the header of the index, and of its lists, the size of each list, then for each its codes
    and its ids.

    Args:
        empty: the index without vectors.
        parts: indexes with the same lists, memory-mapped.
    """
    lists = [part.invlists for part in parts]
    sizes = np.sum([get_invlist_sizes(part) for part in lists], axis=0).astype("<u8")  # type: ignore[no-untyped-call]
    whole = faiss.serialize_index(empty).tobytes()
    header = bytearray(whole[: whole.rindex(_LISTS)])
    struct.pack_into("<q", header, _NTOTAL_AT, int(sizes.sum()))
    with path.open("wb") as file:
        file.write(header)
        file.write(struct.pack("<4sQQ4sQ", _LISTS, empty.nlist, empty.code_size, _ALL_SIZES, empty.nlist))
        file.write(sizes.tobytes())
        for i in range(empty.nlist):
            contents = [get_invlist(part, i) for part in lists]  # type: ignore[no-untyped-call]
            file.writelines(codes.tobytes() for _, codes in contents)
            file.writelines(ids.tobytes() for ids, _ in contents)
    opened = open_faiss(path)
    assert opened.ntotal == int(sizes.sum()), "FAISS reads what was written"
