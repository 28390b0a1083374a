"""An index with lists: coarse codes of vectors in lists of near ones, and the vectors themselves as int8.

A search looks through a few lists, by codes of one bit a dimension, and puts the best candidates in order by their
int8 vectors. Lists are filled in parts that fit in memory, each a file, and merged into one file. So many lists are
looked through, and so many candidates are compared, as the measured recall asks for.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import faiss
import numpy as np

from rexrag.errors import first_line
from rexrag.retrieval.faiss_files import FaissIndex, open_faiss, write_lists
from rexrag.retrieval.recall import ExactResults
from rexrag.retrieval.search import Effort, Searcher
from rexrag.retrieval.vectors import VectorSource

_LISTS_PER_ROOT: Final = 4
_TRAINED_PER_LIST: Final = 64
_LEAST_PER_LIST: Final = 39
"""Below so many vectors a list FAISS itself warns of poor lists."""
_DIMENSIONS_PER_CODE: Final = 4
"""A code of four bits for so many dimensions: with half of the bits more candidates would have to be compared."""
_CODE_BITS: Final = 4
"""What FAISS compares sixteen or thirty-two at a time."""
MOST_CANDIDATES: Final = 256
_LEAST_CANDIDATES: Final = 32
_ABOUT_AS_MUCH: Final = 0.005
_NEARLY_ALL: Final = 0.002
"""What fewer candidates may lose: the lists have been chosen as tightly as the sample allows."""
_WANTED_RECALL: Final = 0.97
"""On the half of the sample that decides, so that the other half, which is reported, has 0.95."""


def num_lists(count: int, *, trained: int) -> int:
    """Lists for so many vectors, of which so many can be trained with: four square roots, as FAISS advises."""
    return max(1, min(round(_LISTS_PER_ROOT * math.sqrt(count)), trained // _LEAST_PER_LIST))


def write_ivf(
    path: Path,
    source: VectorSource,
    *,
    memory_bytes: int,
    use_gpu: bool,
    progress: Callable[[int], None],
    seed: int = 0,
) -> int:
    """Write the lists of an index: codes and row of each vector.

    Args:
        memory_bytes: bound: a quarter of it holds vectors to train with, as float32, a quarter the part of the lists
            that is being filled, a sixteenth the next vectors.
        progress: called with the number of vectors in lists.

    Returns:
        the number of lists.
    """
    dimension = source.dimension
    trainable = min(source.count, max(256, memory_bytes // 4 // (4 * dimension)))
    lists = num_lists(source.count, trained=trainable)
    rng = np.random.default_rng(seed)
    rows = rng.choice(source.count, size=min(trainable, max(256, lists * _TRAINED_PER_LIST)), replace=False)
    index = _trained(source, rows=np.sort(rows), lists=lists, use_gpu=use_gpu)

    parts = path.with_name("parts")
    parts.mkdir()
    part_rows = max(1, memory_bytes // 4 // (index.code_size + 8))
    block_rows = min(part_rows, max(256, memory_bytes // 16 // (4 * dimension)))
    files: list[Path] = []
    added = 0
    for block in source.blocks(block_rows):
        index.add_with_ids(block, np.arange(added, added + len(block)))
        added += len(block)
        progress(added)
        if index.ntotal + block_rows > part_rows or added == source.count:
            files.append(parts / f"{len(files)}.faiss")
            _write(index, files[-1])
            index.reset()
    write_lists(path, index, [open_faiss(file) for file in files])
    shutil.rmtree(parts)
    return lists


def _write(index: FaissIndex, path: Path) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"FAISS: {first_line(error)}") from error


def _trained(
    source: VectorSource, *, rows: np.ndarray[tuple[int], np.dtype[np.int64]], lists: int, use_gpu: bool
) -> FaissIndex:
    """An index without vectors that knows the centres of its lists and its codes."""
    centres = faiss.IndexFlatIP(source.dimension)
    codes = num_codes(source.dimension)
    index = faiss.IndexIVFPQ(centres, source.dimension, lists, codes, _CODE_BITS, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = max(_TRAINED_PER_LIST, -(-len(rows) // lists))
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # as many as memory allows were taken
    if len(rows) < index.pq.ksub:
        rows = np.resize(rows, index.pq.ksub)
    if use_gpu:
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(source.dimension))
        index.clustering_index = on_gpus
        index.train(source.take(rows))
        index.clustering_index = None  # type: ignore[assignment]  # as C++ has it
    else:
        index.train(source.take(rows))
    return index


def num_codes(dimension: int) -> int:
    """Codes of a vector: one for four dimensions, or for fewer where four do not divide them evenly."""
    return min(n for n in range(1, dimension + 1) if dimension % n == 0 and n * _DIMENSIONS_PER_CODE >= dimension)


def choose_effort(searcher: Searcher, exact: ExactResults) -> Effort:
    """Set how much a search looks through: the least that finds enough for one half of the sample.

    Where all lists together do not find enough (coarse codes do not), the least that finds about as much as they.
    """
    lists = searcher.num_lists
    assert lists is not None, "an index with lists"

    def recall(effort: Effort) -> float:
        searcher.set_effort(effort)
        return exact.recall(searcher, k=3, part=exact.first_half)

    most = MOST_CANDIDATES if searcher.has_candidates else None
    wanted = min(_WANTED_RECALL, recall(Effort(probes=lists, candidates=most)) - _ABOUT_AS_MUCH)
    effort = Effort(probes=1, candidates=most)
    while effort.probes < lists and recall(effort) < wanted:
        probes = min(lists, max(effort.probes + 1, round(1.25 * effort.probes)))
        effort = Effort(probes=probes, candidates=most)
    if effort.candidates is not None:
        effort = _with_fewer_candidates(effort, recall)
    searcher.set_effort(effort)
    return effort


def _with_fewer_candidates(effort: Effort, recall: Callable[[Effort], float]) -> Effort:
    """The same lists, and the fewest candidates that find nearly as much."""
    enough = recall(effort) - _NEARLY_ALL
    while effort.candidates is not None and effort.candidates > _LEAST_CANDIDATES:
        less = replace(effort, candidates=max(_LEAST_CANDIDATES, round(effort.candidates / 1.25)))
        if recall(less) < enough:
            break
        effort = less
    return effort
