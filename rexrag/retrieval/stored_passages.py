"""The passages of an index: the user's own jsonl with an offset for each row, or a copy of what has no such rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from rexrag.data.corpus import Corpus, iter_corpus_rows
from rexrag.retrieval.manifest import Manifest, open_corpus_path

OFFSETS_NAME: Final = "offsets.u64"
PASSAGES_NAME: Final = "passages.jsonl"
_REPORT_EVERY: Final = 1 << 12


def open_passages(folder: Path, manifest: Manifest) -> Corpus:
    """The passages of an index folder, by row.

    Raises:
        RetrievalIndexError: the corpus or the offsets are missing or of another size.
    """
    path = folder / PASSAGES_NAME if manifest.corpus.stored else open_corpus_path(folder, manifest)
    return Corpus.open(path, offsets=folder / OFFSETS_NAME)


def store_passages(corpus: Path, jsonl: Path) -> tuple[Path, int]:
    """The corpus as jsonl, and its number of rows without text."""
    empty: list[int] = []
    with jsonl.open("w", encoding="utf-8") as file:
        for _, passage in iter_corpus_rows(corpus, on_empty=lambda row: empty.append(row.number)):
            row = {"id": passage.id, "title": passage.title, "text": passage.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return jsonl, len(empty)


def write_offsets(jsonl: Path, offsets: Path, *, progress: Callable[[int], None] | None = None) -> tuple[int, int]:
    """Write where each row of a jsonl corpus starts, as little-endian u64.

    Args:
        progress: called now and then with the bytes that are read.

    Returns:
        the number of passages, and of rows without text.

    Raises:
        DataError: a bad row, an id that occurs twice, or no passage.
    """
    starts, empty = array("Q"), array("Q")
    for row, _ in iter_corpus_rows(jsonl, on_empty=lambda row: empty.append(row.number)):
        assert row.offset is not None, "rows of jsonl have an offset"
        starts.append(row.offset)
        if progress is not None and len(starts) % _REPORT_EVERY == 0:
            progress(row.offset)
    np.array(starts, dtype="<u8").tofile(offsets)
    return len(starts), len(empty)
