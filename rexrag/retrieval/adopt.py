"""A FAISS file made elsewhere becomes an index: checked against corpus and encoder, then pointed to or converted.

Nothing in such a file says whose vectors it holds, in which order. So a sample of passages is encoded and has to be
found in its own place.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import faiss
import numpy as np

from rexrag.data.corpus import Corpus
from rexrag.errors import DataError, RetrievalIndexError, counted
from rexrag.retrieval.dense_build import SILENT, DenseSettings, Progress, describe_dense, take_passages, write_index
from rexrag.retrieval.encoder import Encoder, Vectors, contents
from rexrag.retrieval.encoder_settings import EncoderOverrides
from rexrag.retrieval.faiss_files import FaissIndex, open_foreign
from rexrag.retrieval.ivf import MOST_CANDIDATES
from rexrag.retrieval.manifest import (
    DenseEntry,
    Manifest,
    describe_files,
    describe_foreign,
    new_index_folder,
    write_manifest,
)
from rexrag.retrieval.recall import ExactResults, encode_sample
from rexrag.retrieval.search import Effort, Searcher
from rexrag.retrieval.vectors import FaissVectors, Rows

_SAMPLE: Final = 64
_LEAST_FOUND: Final = 0.95
"""Graphs, lists and coarse codes miss a few passages that are in their place."""
_SHOWN: Final = 5
_UNIT: Final = 1e-2
"""How far a squared length may be from 1: int8 and fp16 change it."""


def adopt(
    file: str | Path,
    out: str | Path,
    *,
    corpus: str | Path,
    encoder: str | Path,
    convert: bool = False,
    settings: DenseSettings | None = None,
    overrides: EncoderOverrides | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """Make an index folder of a FAISS file; an index at `out` is replaced once the new one is complete.

    Args:
        convert: write an index as `settings` say; else the folder points to the file, which stays where it is.

    Raises:
        RetrievalIndexError: the file is no FAISS index, or not one of these passages in this order by this encoder.
        DataError: no such corpus, or a bad row.
        ModelError: no usable encoder.
    """
    path, source, target, settings = Path(file), Path(corpus), Path(out), settings or DenseSettings()
    if not source.exists():
        raise DataError(f"{source}: no such file; give a corpus, jsonl or parquet")
    index = open_foreign(path)
    loaded = Encoder.load(encoder, overrides=overrides, device=settings.device)
    with new_index_folder(target, made_from=[source, path]) as folder:
        passages, described, num_empty = take_passages(source, folder, out=target, progress=progress)
        with passages:
            progress.stage("comparing a sample")
            _check_shape(index, path, passages=passages, encoder=loaded, num_empty=num_empty)
            vectors = _vectors_of(index)
            _check_metric(index, path, vectors)
            _check_order(index, path, passages=passages, encoder=loaded)
            if convert:
                if vectors is None:
                    raise RetrievalIndexError(
                        f"{path}: a {_kind(index)} does not give its vectors back, so it cannot be converted; leave "
                        "--to out to use it as it is, or build an index from the corpus"
                    )
                dense = write_index(
                    folder, vectors, corpus=passages, encoder=loaded, settings=settings, progress=progress
                )
            else:
                dense = _point_to(
                    path, index, vectors, out=target, corpus=passages, encoder=loaded, settings=settings, told=progress
                )
            manifest = Manifest(
                kind=settings.kind if convert else "adopted",
                dense=dense,
                passages=len(passages),
                empty_rows=num_empty,
                corpus=described,
                files=describe_files(folder),
            )
        write_manifest(folder, manifest)
    return manifest


def _check_shape(index: FaissIndex, path: Path, *, passages: Corpus, encoder: Encoder, num_empty: int) -> None:
    if index.d != encoder.dimension:
        raise RetrievalIndexError(
            f"{path}: its vectors have {counted(index.d, 'dimension')}, those of {encoder.folder} {encoder.dimension}; "
            "name the encoder that it was made with"
        )
    if index.ntotal != len(passages):
        left_out = f" ({counted(num_empty, 'row')} without text left out)" if num_empty else ""
        raise RetrievalIndexError(
            f"{path}: {counted(index.ntotal, 'vector')}, and the corpus has {counted(len(passages), 'passage')}"
            f"{left_out}; name the corpus that it was made from"
        )


def _vectors_of(index: FaissIndex) -> FaissVectors | None:
    """The vectors of an index, where it gives them back."""
    try:
        vectors = FaissVectors(index)
        vectors.take([0])
    except RuntimeError:  # FAISS's own for what a kind of index cannot do
        return None
    return vectors


def _check_metric(index: FaissIndex, path: Path, vectors: FaissVectors | None) -> None:
    """Inner product, or L2 distance between vectors of length 1, which ranks the same."""
    if index.metric_type == faiss.METRIC_INNER_PRODUCT:
        return
    if index.metric_type != faiss.METRIC_L2:
        raise RetrievalIndexError(
            f"{path}: made for metric {index.metric_type}, and inner product or L2 is needed; build an index from the "
            "corpus"
        )
    sample = None if vectors is None else vectors.take(_sample_rows(vectors.count))
    if sample is None or np.abs((sample**2).sum(1) - 1).max() > _UNIT:
        length = "unknown" if sample is None else f"{np.sqrt((sample**2).sum(1)).max():.3g}"
        raise RetrievalIndexError(
            f"{path}: made for L2 distance over vectors that are not of length 1 (largest length {length}): they rank "
            "otherwise than inner products; build an index from the corpus"
        )


def _sample_rows(count: int) -> list[int]:
    return sorted(random.Random(0).sample(range(count), min(_SAMPLE, count)))


def _check_order(index: FaissIndex, path: Path, *, passages: Corpus, encoder: Encoder) -> None:
    """A sample of passages has to be found in its own place, or in that of a passage with the same text."""
    rows = _sample_rows(len(passages))
    sample = [passages.get(row) for row in rows]
    found = _best_rows(index, encoder.passages(sample))
    others = [
        (row, passage, other)
        for row, passage, other in zip(rows, sample, found.tolist(), strict=True)
        if other != row and (other < 0 or contents(passages.get(other)) != contents(passage))
    ]
    if len(others) > (1 - _LEAST_FOUND) * len(rows):
        shown = "; ".join(
            f"passage {passage.id} (row {row}) is nearest to row {other}" for row, passage, other in others[:_SHOWN]
        )
        raise RetrievalIndexError(
            f"{path}: {len(others)} of {counted(len(rows), 'passage')}, encoded anew, are not found in their place: "
            f"{shown}. Name the corpus in the order it was indexed in, and the encoder, its prefixes and its pooling"
        )


def _best_rows(index: FaissIndex, vectors: Vectors) -> Rows:
    searcher = Searcher(index)
    if searcher.num_lists is not None:
        candidates = MOST_CANDIDATES if searcher.has_candidates else None
        searcher.set_effort(Effort(probes=searcher.num_lists, candidates=candidates))
    _, rows = searcher.search(vectors, 1)
    return rows[:, 0]


def _point_to(
    path: Path,
    index: FaissIndex,
    vectors: FaissVectors | None,
    *,
    out: Path,
    corpus: Corpus,
    encoder: Encoder,
    settings: DenseSettings,
    told: Progress,
) -> DenseEntry:
    told.stage("hashing the file")
    file = describe_foreign(path, out=out)
    searcher = Searcher(index)
    exact = None
    if vectors is not None:
        told.stage("measuring recall")
        queries = encode_sample(corpus, encoder, questions=settings.questions)
        exact = ExactResults(vectors, queries, block_rows=settings.block_rows(vectors.dimension))
    return describe_dense(searcher, exact, encoder=encoder, precision=None, file=file)


def _kind(index: FaissIndex) -> str:
    return type(index).__name__
