"""Tokenisers of the BM25 index, by the name in its manifest: passages and queries go through the same one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import tantivy

from rexrag.retrieval.scripts import CJK, spaceless_scripts

LOG = logging.getLogger(__name__)

ENGLISH: Final = "english-1"
"""Words split at anything but letters and digits, lower case, without accents, English stems; no stop words."""
CJK_AND_ENGLISH: Final = "cjk-english-1"
"""The same, but each Chinese, Japanese or Korean letter is a word of its own."""

_MAX_WORD_BYTES: Final = 64
_CJK_CLASS: Final = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
_CJK_LETTER_OR_WORD: Final = rf"[{_CJK_CLASS}]|[\p{{Alphabetic}}\p{{N}}--[{_CJK_CLASS}]]+"


def choose_analyser(jsonl: Path) -> str:
    """The analyser for a corpus, by its scripts; warns of one whose words none of them can tell apart."""
    shares = spaceless_scripts(jsonl)
    covered = shares.pop(CJK, 0.0)
    for script, share in shares.items():
        LOG.warning(
            "%s: %.0f%% of its letters are %s, which puts no spaces between words, and BM25 has no tokeniser for it "
            "here: a query finds whole runs of its letters only. Use a search server for this corpus "
            '(retriever.kind = "http")',
            jsonl,
            max(1.0, 100 * share),
            script,
        )
    return CJK_AND_ENGLISH if covered else ENGLISH


def _english() -> tantivy.TextAnalyzer:
    return _normalised(tantivy.Tokenizer.simple())


def _cjk_and_english() -> tantivy.TextAnalyzer:
    return _normalised(tantivy.Tokenizer.regex(_CJK_LETTER_OR_WORD))


def _normalised(tokenizer: tantivy.Tokenizer) -> tantivy.TextAnalyzer:
    return (
        tantivy.TextAnalyzerBuilder(tokenizer)
        .filter(tantivy.Filter.remove_long(_MAX_WORD_BYTES))
        .filter(tantivy.Filter.lowercase())
        .filter(tantivy.Filter.ascii_fold())
        .filter(tantivy.Filter.stemmer("english"))
        .build()
    )


ANALYSERS: Final[Mapping[str, Callable[[], tantivy.TextAnalyzer]]] = MappingProxyType(
    {ENGLISH: _english, CJK_AND_ENGLISH: _cjk_and_english}
)
