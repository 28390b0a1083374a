"""Corpora, their vectors, and brute force over them, for the tests of dense indexes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rexrag.data.corpus import iter_corpus
from rexrag.retrieval.encoder import Encoder, Vectors

QUERIES = [f"what is the {fact} of Land{i}?" for i in range(120) for fact in ("currency", "capital")]


def exact_scores(encoder: Encoder, corpus: Path, queries: Sequence[str]) -> Vectors:
    """Score of each passage for each query, float32[N, M], by a product of all vectors."""
    scores: Vectors = encoder.queries(queries) @ encoder.passages(list(iter_corpus(corpus))).T
    return scores


def best_ids(scores: Vectors, ids: Sequence[str], k: int) -> list[list[str]]:
    """The ids of the best `k` passages for each query, best first; equal ones by row."""
    return [[ids[row] for row in order[:k]] for order in np.argsort(-scores.round(6), axis=1, kind="stable")]
