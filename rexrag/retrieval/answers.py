"""What a search server's answer says: passages, a refusal of this query, a passing failure, or a wrong set-up."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

from rexrag.data.corpus import passage_of
from rexrag.data.rows import RowError, encodable, id_of, shown
from rexrag.errors import QueryRefusedError, RetrieverSetupError, counted
from rexrag.retrieval.attempts import RetryableError
from rexrag.types import Passage

MAX_BODY_BYTES: Final = 1 << 24
"""Bound of a decoded answer: a hundred passages of 160 kB."""

_OK: Final = 200
_BUSY: Final = 429
_BROKEN: Final = 500
_PASSING: Final = frozenset({408, 425, _BUSY})
_REFUSALS: Final = frozenset({400, 413, 414, 422, 431})
_FILLER_SCORE: Final = 1e38
"""Servers over FAISS fill up a result with the last passage at the least float (inner product) or the largest (L2)."""
_SHOWN_CHARS: Final = 200
_INFLATE_BYTES: Final = 1 << 16
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS


@dataclass(frozen=True, kw_only=True)
class Body:
    """A status and the bytes that came with it, decoded, at most `MAX_BODY_BYTES` of them.

    `is_delimited`: the server said where they end; else the end of the connection is, also of one that broke.
    """

    url: str
    status: int
    content: bytes
    is_whole: bool
    is_delimited: bool = True
    retry_after: str = ""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds of its Retry-After; a date there is not read."""
        text = self.retry_after.strip()
        return float(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None

    @property
    def first_words(self) -> str:
        words = " ".join(self.content[: 4 * _SHOWN_CHARS].decode("utf-8", "replace").split())
        return words[:_SHOWN_CHARS]

    @property
    def described(self) -> str:
        """Status and first words, on one line."""
        return f"status {self.status} ({self.first_words})"


async def read_bounded(chunks: AsyncIterator[bytes], *, encoding: str) -> tuple[bytes, bool]:
    """The decoded bytes of an answer and whether these are all; what exceeds the bound is never decoded.

    Args:
        chunks: as they came over the wire.
        encoding: the answer's Content-Encoding.

    Raises:
        ValueError: an encoding that was not asked for, or damaged bytes.
        RetryableError: bytes that end too early.
    """
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ValueError(f"Content-Encoding {encoding} was not asked for; gzip or none is read")
    inflate = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding not in ("", "identity") else None
    content = bytearray()
    async for chunk in chunks:
        rest = chunk
        while rest and len(content) <= MAX_BODY_BYTES:
            if inflate is None:
                content += rest
                break
            try:
                content += inflate.decompress(rest, _INFLATE_BYTES)
            except zlib.error as error:
                raise ValueError(f"its {encoding} bytes are damaged: {error}") from error
            rest = inflate.unconsumed_tail
        if len(content) > MAX_BODY_BYTES:
            return bytes(content[:MAX_BODY_BYTES]), False
    if inflate is not None and content and not inflate.eof:
        raise RetryableError(f"its {encoding} bytes end too early")
    return bytes(content), True


def passages_of(body: Body, *, top_k: int, num_queries: int) -> tuple[list[tuple[Passage, ...]], int]:
    """The passages of each query, at most `top_k`, and the number of those left out for want of a text.

    Raises:
        RetryableError: 5xx, 408 or 429, or an answer that may have been cut off.
        QueryRefusedError: the server does not take this query: 400, 413, 414, 422, 431.
        RetrieverSetupError: another status, or another form than those of the API.
    """
    if body.status >= 500 or body.status in _PASSING:
        raise RetryableError(
            body.described,
            retry_after_s=body.retry_after_s,
            is_busy=body.status == _BUSY,
            is_broken=body.status == _BROKEN,
        )
    if body.status in _REFUSALS:
        raise QueryRefusedError(f"{body.url}: {body.described}")
    if body.status != _OK:
        raise RetrieverSetupError(f"{body.url}: {body.described}; correct the server, or retriever.url")
    if not body.is_whole:
        raise RetrieverSetupError(
            f"{body.url}: the answer has more than {MAX_BODY_BYTES} bytes; let the server cut its passages, "
            "or lower env.top_k"
        )
    try:
        return parse(_decoded(body), top_k=top_k, num_queries=num_queries)
    except (ValueError, RecursionError) as error:
        raise RetrieverSetupError(f"{body.url}: malformed answer: {error}; {body.described}") from error


def _decoded(body: Body) -> object:
    try:
        value: object = json.loads(body.content)
        return value
    except (ValueError, RecursionError) as error:
        if body.is_delimited:
            raise
        raise RetryableError(f"no JSON, perhaps cut off ({error}): {body.described}") from error


def parse(value: object, *, top_k: int, num_queries: int) -> tuple[list[tuple[Passage, ...]], int]:
    """The passages of each query in an answer's JSON, without filler and repeats, and the number of those without text.

    Raises:
        RowError: another form.
    """
    result = value.get("result") if isinstance(value, dict) else None
    if not isinstance(result, list) or len(result) != num_queries or not all(isinstance(one, list) for one in result):
        raise RowError(f'expected {{"result": [[…]]}} with {counted(num_queries, "list")}, got {shown(value)}')
    found, num_empty = [], 0
    for entries in result:
        kept: dict[tuple[str, str], Passage] = {}
        for entry in entries:
            passage, score = _passage(entry)
            if passage is None:
                num_empty += 1
            elif score is None or abs(score) < _FILLER_SCORE:
                kept.setdefault((passage.title, passage.text), passage)
        found.append(tuple(kept.values())[:top_k])
    return found, num_empty


def _passage(entry: object) -> tuple[Passage | None, float | None]:
    document, score = entry, None
    if isinstance(entry, dict) and "document" in entry:
        document, score = entry["document"], entry.get("score")
    if isinstance(document, str):
        document = {"contents": document}  # servers that rank again answer with plain texts
    if not isinstance(document, Mapping):
        raise RowError(f"expected an object or a text for each passage, got {shown(document)}")
    # A server that cuts between two units of UTF-16 leaves half a character.
    document = {name: encodable(value) if isinstance(value, str) else value for name, value in document.items()}
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise RowError(f'expected a number as "score", got {shown(score)}')
    # The order is the server's, so that a score that is no number does no harm.
    score = None if score is None or math.isnan(score) else float(score)
    passage = passage_of(document, identity=id_of(document) or "", score=score)
    # Servers in front of web search give no ids; what a passage says identifies it there.
    return (passage if passage is None or passage.id else _with_content_id(passage)), score


def _with_content_id(passage: Passage) -> Passage:
    digest = hashlib.sha256(f"{passage.title}\n{passage.text}".encode()).hexdigest()[:16]
    return Passage(id=digest, title=passage.title, text=passage.text, score=passage.score)
