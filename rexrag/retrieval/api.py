"""The bodies of the /retrieve API, as a server sees them: what was asked, within limits, and the answer to it. Pure.

{"queries": [str], "topk": int?, "return_scores": bool?}
  -> {"result": [[{"document": {"id", "contents"}, "score"} …]]}  or  {"result": [[{"id", "contents"} …]]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rexrag.data.corpus import contents_of
from rexrag.data.rows import encodable, shown
from rexrag.errors import counted
from rexrag.retrieval.limits import Limits
from rexrag.types import Passage

_MALFORMED: Final = 400
_TOO_LONG: Final = 413
_INVALID: Final = 422


@dataclass(frozen=True, kw_only=True)
class RetrieveRequest:
    """A request that keeps the limits. Queries are valid Unicode."""

    queries: Sequence[str]
    top_k: int
    with_scores: bool


class RequestRefusedError(Exception):
    """A request that is not answered: its HTTP status and a sentence that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def body_too_long(limits: Limits) -> RequestRefusedError:
    return RequestRefusedError(
        _TOO_LONG, f"the body has more than {counted(limits.max_body_bytes, 'byte')}; send fewer queries at once"
    )


def parse_request(body: bytes, limits: Limits) -> RetrieveRequest:
    """What a body asks for.

    Raises:
        RequestRefusedError: 413: too long; 400: no JSON; 422: another form, or beyond a limit, which it names.
    """
    if len(body) > limits.max_body_bytes:
        raise body_too_long(limits)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError(_MALFORMED, f"the body is not JSON: {error or 'nested too deeply'}") from None
    if not isinstance(value, Mapping):
        raise RequestRefusedError(_INVALID, f'expected an object with "queries", got {shown(value)}')
    queries = _queries(value.get("queries"), limits)
    top_k = limits.default_top_k if value.get("topk") is None else _top_k(value["topk"], limits)
    return RetrieveRequest(queries=queries, top_k=top_k, with_scores=_flag(value.get("return_scores")))


def _queries(value: object, limits: Limits) -> list[str]:
    if not isinstance(value, list):
        raise RequestRefusedError(_INVALID, f'"queries": expected a list of strings, got {shown(value)}')
    if len(value) > limits.max_queries:
        raise RequestRefusedError(
            _INVALID, f'"queries": at most {limits.max_queries} at once, got {len(value)}; send them in parts'
        )
    queries = []
    for number, query in enumerate(value):
        if not isinstance(query, str):
            raise RequestRefusedError(_INVALID, f'"queries"[{number}]: expected a string, got {shown(query)}')
        if len(query) > limits.max_query_chars:
            raise RequestRefusedError(
                _INVALID,
                f'"queries"[{number}]: at most {counted(limits.max_query_chars, "character")}, got {len(query)}',
            )
        # Half a surrogate pair is no letter: no encoder and no analyser takes it.
        queries.append(encodable(query))
    return queries


def _top_k(value: object, limits: Limits) -> int:
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not is_whole or not 1 <= value <= limits.max_top_k:  # type: ignore[operator]
        raise RequestRefusedError(
            _INVALID, f'"topk": expected a whole number from 1 to {limits.max_top_k}, got {shown(value)}'
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def _flag(value: object) -> bool:
    if value is None or value in (0, 1):  # True and False too
        return bool(value)
    raise RequestRefusedError(_INVALID, f'"return_scores": expected true or false, got {shown(value)}')


def render_result(found: Sequence[Sequence[Passage]], *, with_scores: bool) -> bytes:
    """The body of an answer: for each query its documents, each `id` and `contents` as in a corpus."""
    result = [[_entry(passage, with_scores=with_scores) for passage in passages] for passages in found]
    # Ids of a corpus may hold half a surrogate pair, which has no UTF-8 form.
    return json.dumps({"result": result}, ensure_ascii=False).encode("utf-8", "replace")


def _entry(passage: Passage, *, with_scores: bool) -> dict[str, object]:
    document: dict[str, object] = {"id": passage.id, "contents": contents_of(passage)}
    return {"document": document, "score": passage.score} if with_scores else document
