"""BM25 in this process: an embedded index over a corpus that stays where it is.

index/  index.json · offsets.u64 (where each row starts) · tantivy/ (postings)
        passages.jsonl (only for a parquet corpus, whose rows cannot be read singly)
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import tantivy

from rexrag.data.corpus import iter_corpus_rows
from rexrag.data.formats import format_of
from rexrag.data.rows import encodable
from rexrag.errors import DataError, RetrievalIndexError, counted
from rexrag.processes import num_cores
from rexrag.retrieval.analysers import ANALYSERS, choose_analyser
from rexrag.retrieval.answer_cache import AnswerCache
from rexrag.retrieval.manifest import (
    Manifest,
    check_sizes,
    describe_corpus,
    describe_files,
    new_index_folder,
    read_manifest,
    write_manifest,
)
from rexrag.retrieval.protocol import RetrieverState
from rexrag.retrieval.stored_passages import OFFSETS_NAME, PASSAGES_NAME, open_passages, store_passages
from rexrag.types import Passage

POSTINGS_NAME: Final = "tantivy"

_MAX_QUERY_TERMS: Final = 256
_HEAP_BYTES: Final = 128_000_000
_CACHE_CHARS: Final = 16_000_000
_MAX_THREADS: Final = 4
_FIRST_TIES: Final = 61
_MAX_TIES: Final = 4096

_CONTENTS: Final = "contents"
_ROW: Final = "row"
_TIE: Final = "tie"
_Scores: TypeAlias = npt.NDArray[np.float64]


def build_bm25(corpus: str | Path, out: str | Path, *, analyser: str | None = None) -> Manifest:
    """Index a corpus; an index at `out` is replaced once the new one is complete.

    Args:
        analyser: one of `ANALYSERS`; None: by the corpus's scripts.

    Raises:
        DataError: no such file, a bad row, an id that occurs twice, or a corpus that changed meanwhile.
        RetrievalIndexError: `out` exists and is no index.
    """
    source, target = Path(corpus), Path(out)
    if not source.exists():
        raise DataError(f"{source}: no such file; give a corpus, jsonl or parquet")
    stored = format_of(source) != "jsonl"
    with new_index_folder(target, made_from=[source]) as folder:
        described = describe_corpus(source, out=target, stored=stored)
        jsonl, num_empty = store_passages(source, folder / PASSAGES_NAME) if stored else (source, 0)
        analyser = analyser or choose_analyser(jsonl)
        starts, num_empty_lines = _write_postings(jsonl, folder / POSTINGS_NAME, analyser=analyser)
        starts.tofile(folder / OFFSETS_NAME)
        if source.stat().st_size != described.bytes:
            raise DataError(f"{source}: changed while it was indexed; build again once it is complete")
        files = describe_files(folder)
        manifest = Manifest(
            kind="bm25",
            analyser=analyser,
            passages=len(starts),
            empty_rows=num_empty + num_empty_lines,
            corpus=described,
            files=files,
        )
        write_manifest(folder, manifest)
    return manifest


class BM25Index:
    """An index folder, opened for searches that block: a `BatchIndex` whose form of a query is its text.

    Each distinct term of a query counts once. A query without a term that occurs in the corpus finds nothing: an
    empty result, which says so truthfully. Passages of equal score come in an order that depends on the query and
    the passages' ids alone: the same for the same query, another for other queries, so that no passage always
    stands first.

    Several threads may search at once.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open an index; sizes are checked, hashes are not (`check_index`).

        Raises:
            RetrievalIndexError: no index there, a damaged one, or a corpus that is missing or of another size.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        check_sizes(root, manifest)
        if manifest.analyser is None:
            raise RetrievalIndexError(f'{root}: a {manifest.kind} index, no bm25; set retriever.kind = "faiss"')
        if manifest.analyser not in ANALYSERS:
            known = ", ".join(ANALYSERS)
            message = f"{root}: analyser {manifest.analyser!r} is unknown, this build has {known}; build it again"
            raise RetrievalIndexError(message)
        self._corpus = open_passages(root, manifest)
        self._analyser = ANALYSERS[manifest.analyser]()
        self._searcher, self._schema = _open_postings(root / POSTINGS_NAME)
        if not self._searcher.num_docs == len(self._corpus) == manifest.passages:
            raise RetrievalIndexError(
                f"{root}: {counted(self._searcher.num_docs, 'indexed passage')} and "
                f"{counted(len(self._corpus), 'offset')} do not fit the "
                f"{manifest.passages} of its manifest; build it again"
            )

    @property
    def num_passages(self) -> int:
        return len(self._corpus)

    def prepare(self, queries: Sequence[str]) -> Sequence[str]:
        return queries

    def find(self, prepared: Sequence[str], *, top_k: int) -> list[tuple[Passage, ...]]:
        """Of each query the best passages, best first, at most `top_k`; none where no term of it is known.

        Raises:
            RetrievalIndexError: the corpus changed under the index.
        """
        return [self.find_one(query, top_k) for query in prepared]

    def close(self) -> None:
        self._corpus.close()

    def find_one(self, query: str, top_k: int) -> tuple[Passage, ...]:
        """`find` for a single query."""
        words = self._analyser.analyze(encodable(query))
        terms = list(dict.fromkeys(words))[:_MAX_QUERY_TERMS]
        if not terms:
            return ()
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self._schema, _CONTENTS, term, index_option="freq"))
            for term in terms
        ]
        scores, addresses = self._hits(tantivy.Query.boolean_query(clauses), top_k)
        if not addresses:
            return ()
        tie_keys = np.array(self._values(_TIE, addresses), dtype=np.uint64)
        order = np.lexsort((_mixed(tie_keys, query), -scores))[:top_k]
        best = [addresses[i] for i in order]
        rows = self._values(_ROW, best)
        return tuple(
            replace(self._corpus.get(row), score=float(score)) for row, score in zip(rows, scores[order], strict=True)
        )

    def _hits(self, query: tantivy.Query, top_k: int) -> tuple[_Scores, list[tantivy.DocAddress]]:
        """At least the best `top_k` and all passages that share the score of the last of them (up to a bound)."""
        limit = top_k + _FIRST_TIES
        while True:
            hits = self._searcher.search(query, limit, count=False).hits
            # Sums of the same terms in another order differ in the last digits: they count as equal.
            scores = np.array([float(f"{score:.6g}") for score, _ in hits], dtype=np.float64)
            if len(hits) < limit or scores[-1] < scores[top_k - 1] or limit >= _MAX_TIES:
                return scores, [address for _, address in hits]
            limit *= 8

    def _values(self, field: str, addresses: list[tantivy.DocAddress]) -> list[int]:
        values = self._searcher.fast_field_values(field, addresses)
        return [value for value in values if isinstance(value, int)]


INLINE_PASSAGES: Final = 50_000
"""Up to so many a search takes less than a pass of an engine, and is done where it is asked for: episodes then go on in
one order, and a synchronous run is the same each time, bit for bit."""


class BM25Retriever:
    """Searches an index folder in this process, in threads of its own: the event loop goes on meanwhile.

    retriever = BM25Retriever(folder)
    passages = await retriever.search("currency of Gabon", top_k=3)
    """

    def __init__(self, folder: str | Path) -> None:
        """Errors are those of `BM25Index`."""
        self._index = BM25Index(folder)
        self._cache = AnswerCache(_CACHE_CHARS)
        num_threads = min(_MAX_THREADS, num_cores())
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="bm25")

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """As `BM25Index.find`, for one query."""
        assert top_k >= 1, f"top_k must be at least 1, got {top_k}"
        if (known := self._cache.get((query, top_k))) is not None:
            return known
        if self._index.num_passages <= INLINE_PASSAGES:
            found = self._index.find_one(query, top_k)
        else:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._threads, self._index.find_one, query, top_k)
        self._cache.put((query, top_k), found)
        return found

    def state(self) -> RetrieverState:
        return RetrieverState()

    async def close(self) -> None:
        self._threads.shutdown()
        self._cache.clear()
        self._index.close()


def _mixed(keys: npt.NDArray[np.uint64], query: str) -> npt.NDArray[np.uint64]:
    """A pseudo-random order of keys for each query (the finaliser of splitmix64)."""
    mixed = keys ^ np.uint64(_hash64(query))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return result


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _write_postings(jsonl: Path, folder: Path, *, analyser: str) -> tuple[npt.NDArray[np.uint64], int]:
    """Index a jsonl corpus into `folder`.

    Returns:
        the byte at which each row starts, as little-endian u64, and the number of rows without text.
    """
    folder.mkdir()
    builder = tantivy.SchemaBuilder()
    builder.add_text_field(_CONTENTS, stored=False, tokenizer_name=analyser, index_option="freq")
    # Unsigned by name: a type inferred from the first value stops the writer at the first that does not fit.
    builder.add_unsigned_field(_ROW, stored=False, indexed=False, fast=True)
    builder.add_unsigned_field(_TIE, stored=False, indexed=False, fast=True)
    try:
        index = tantivy.Index(builder.build(), path=str(folder))
        index.register_tokenizer(analyser, ANALYSERS[analyser]())
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        try:
            starts, num_empty = _add_passages(writer, jsonl)
            writer.commit()
        finally:
            # Its threads write into the folder until they are joined.
            writer.wait_merging_threads()
    except DataError:
        raise
    except ValueError as error:  # all that tantivy says, of a full disk too
        raise OSError(f"tantivy: {error}") from error
    return np.array(starts, dtype="<u8"), num_empty


def _add_passages(writer: tantivy.IndexWriter, jsonl: Path) -> tuple[array[int], int]:
    starts = array("Q")
    empty: list[int] = []
    for number, (row, passage) in enumerate(iter_corpus_rows(jsonl, on_empty=lambda row: empty.append(row.number))):
        assert row.offset is not None, "rows of jsonl have an offset"
        document = tantivy.Document()
        document.add_text(_CONTENTS, f"{passage.title}\n{passage.text}")
        document.add_unsigned(_ROW, number)
        document.add_unsigned(_TIE, _hash64(passage.id))
        writer.add_document(document)
        starts.append(row.offset)
    return starts, len(empty)


def _open_postings(folder: Path) -> tuple[tantivy.Searcher, tantivy.Schema]:
    try:
        index = tantivy.Index.open(str(folder))
        return index.searcher(), index.schema
    except (OSError, ValueError) as error:
        raise RetrievalIndexError(f"{folder}: cannot be opened ({error}); build the index again") from error
