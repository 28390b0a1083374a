"""An index with lists: vectors as int8 in lists of near ones, of which a search looks through a few.

Lists are filled in parts that fit in memory, each a file, and merged into one file. So many of them are looked
through as the measured recall asks for.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import faiss
import numpy as np

from rexrag.retrieval.faiss_files import FaissIndex, open_faiss, write_lists
from rexrag.retrieval.recall import ExactResults
from rexrag.retrieval.search import Searcher
from rexrag.retrieval.vectors import VectorSource

_LISTS_PER_ROOT: Final = 4
_TRAINED_PER_LIST: Final = 64
_LEAST_PER_LIST: Final = 39
"""Below so many vectors a list FAISS itself warns of poor lists."""
_ABOUT_AS_MUCH: Final = 0.005
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
    """Write an index file with lists.

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
            faiss.write_index(index, str(files[-1]))
            index.reset()
    write_lists(path, index, [open_faiss(file) for file in files])
    shutil.rmtree(parts)
    return lists


def _trained(
    source: VectorSource, *, rows: np.ndarray[tuple[int], np.dtype[np.int64]], lists: int, use_gpu: bool
) -> FaissIndex:
    """An index without vectors that knows the centres of its lists and the range of int8 in each dimension."""
    centres = faiss.IndexFlatIP(source.dimension)
    int8 = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(centres, source.dimension, lists, int8, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = max(_TRAINED_PER_LIST, -(-len(rows) // lists))
    index.cp.min_points_per_centroid = 1  # as many as memory allows were taken
    if use_gpu:
        on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(source.dimension))
        index.clustering_index = on_gpus
        index.train(source.take(rows))
        index.clustering_index = None  # type: ignore[assignment]  # as C++ has it
    else:
        index.train(source.take(rows))
    return index


def choose_probes(searcher: Searcher, exact: ExactResults) -> int:
    """Set the number of lists that a search looks through: the least that finds enough for one half of the sample.

    Where all lists together do not find enough (coarse codes do not), the least that finds about as much as they.
    """
    lists = searcher.num_lists
    assert lists is not None, "an index with lists"

    def recall(probes: int) -> float:
        searcher.set_probes(probes)
        return exact.recall(searcher, k=3, part=exact.first_half)

    wanted = min(_WANTED_RECALL, recall(lists) - _ABOUT_AS_MUCH)
    probes = 1
    while probes < lists and recall(probes) < wanted:
        probes = min(lists, max(probes + 1, round(1.25 * probes)))
    searcher.set_probes(probes)
    return probes
