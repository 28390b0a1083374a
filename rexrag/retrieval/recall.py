"""How many of the truly best passages a search finds: measured against brute force, never assumed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from rexrag.data.corpus import Corpus
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.manifest import RecallEntry
from rexrag.retrieval.search import Searcher
from rexrag.retrieval.vectors import Rows, VectorSource

SAMPLE_QUERIES: Final = 512
DEPTH: Final = 10
_QUERY_WORDS: Final = 6
_NEARLY: Final = 1e-6
"""Passages of equal text have one score: which of them is found makes no difference."""


def sample_queries(corpus: Corpus, *, count: int = SAMPLE_QUERIES, seed: int = 0) -> list[str]:
    """Queries of passages drawn evenly: a few of its words in a row, every other time behind its title."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(corpus)), min(count, len(corpus)))
    queries = []
    for number, row in enumerate(rows):
        passage = corpus.get(row)
        words = passage.text.split()
        start = rng.randrange(max(1, len(words) - _QUERY_WORDS + 1))
        title = passage.title if number % 2 else ""
        queries.append(" ".join([title, *words[start : start + _QUERY_WORDS]]).strip())
    return queries


class ExactResults:
    """The truly best passages of a sample of queries, by brute force in blocks."""

    def __init__(self, source: VectorSource, queries: Vectors, *, block_rows: int) -> None:
        """
        Args:
            source: the vectors, as precise as there are.
            queries: float32[N, D].
            block_rows: vectors in memory at a time.
        """
        self.queries = queries
        half = len(queries) // 2 if len(queries) > 1 else None
        self.first_half, self.second_half = slice(half), slice(half or 0, None)
        self._source = source
        depth = min(DEPTH, source.count)
        self._scores, _ = knn_ground_truth(  # type: ignore[no-untyped-call]
            queries, source.blocks(block_rows), depth, metric_type=faiss.METRIC_INNER_PRODUCT, ngpu=0
        )

    def recall(self, searcher: Searcher, *, k: int, part: slice = slice(None)) -> float:
        """Mean share of the `k` best passages among the first `k` that a search finds; ties count as found."""
        queries, exact = self.queries[part], self._scores[part]
        k = min(k, exact.shape[1])
        _, rows = searcher.search(queries, k)
        true_scores = self._scores_of(queries, rows)
        return float(np.mean(true_scores >= exact[:, k - 1 : k] - _NEARLY))

    def _scores_of(self, queries: Vectors, rows: Rows) -> Vectors:
        """The scores of found rows by the precise vectors, -inf for missing ones."""
        wanted, place = np.unique(np.maximum(rows, 0), return_inverse=True)
        vectors = self._source.take(wanted)
        scores: Vectors = np.empty(rows.shape, dtype=np.float32)
        for i, query in enumerate(queries):
            scores[i] = vectors[place.reshape(rows.shape)[i]] @ query
        scores[rows < 0] = -np.inf
        return scores

    def measure(self, searcher: Searcher, *, part: slice = slice(None)) -> RecallEntry:
        return RecallEntry(
            queries=len(self.queries[part]),
            at_3=round(self.recall(searcher, k=3, part=part), 4),
            at_10=round(self.recall(searcher, k=DEPTH, part=part), 4),
        )


def encode_sample(corpus: Corpus, encoder: Encoder, *, questions: Sequence[str] = ()) -> Vectors:
    """A sample of queries as vectors, float32[N, D]: of these questions, or without any of words of the corpus."""
    texts = sample_queries(corpus)
    if questions:
        texts = random.Random(0).sample(list(questions), min(SAMPLE_QUERIES, len(questions)))
    return encoder.queries(texts)
