"""What a model turn asks for, and which of its tokens say so."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from rexrag.env.codec import Codec

STOP_STRINGS: Final = ("</search>", "</answer>")
"""Generation of a turn ends with the token that completes one of these."""

_TAG: Final = re.compile(r"<(/?)(search|answer)>")


@dataclass(frozen=True, slots=True)
class Search:
    """The turn searches. `query` is stripped and not empty."""

    query: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The turn answers and ends the episode. `text` is stripped and not empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """The turn has no complete action; `reason` is a clause that the feedback to the model quotes."""

    reason: str


Action: TypeAlias = Search | Answer | Malformed


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedAction:
    """The action of a turn and its place among the turn's tokens.

    Attributes:
        start: the first token that contains a character of the action's opening tag; None where malformed.
        end: number of tokens that are kept: what follows the token that completes the action does not exist.
    """

    action: Action
    start: int | None
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """A complete tag pair in a text: characters [start, end), both tags included."""

    action: Action
    start: int
    end: int


def parse_action(text: str) -> Action:
    """The first action that is complete in the text of one turn.

    The first is the one whose closing tag comes first, since generation stops there. A closing tag belongs to
    the nearest opening tag of its kind before it: `<search>a<search>b</search>` searches for "b", so that a tag
    left open in a thought does not swallow the action that follows. A complete action without content is
    malformed, whatever comes after it. Tags are lower case, without spaces.
    """
    found = _first_pair(text)
    return found.action if isinstance(found, _Span) else found


def locate_action(token_ids: Sequence[int], *, codec: Codec) -> LocatedAction:
    """The action in the tokens of one turn (hint tokens at its head included), as `parse_action` reads their text.

    A token that spans the end of the closing tag is kept whole and is the last. After an action without content
    the tokens are cut as after any other.
    """
    text = codec.decode(token_ids)
    found = _first_pair(text)
    if isinstance(found, Malformed):
        return LocatedAction(action=found, start=None, end=len(token_ids))
    end = _num_tokens_covering(text[: found.end], token_ids, codec=codec)
    if isinstance(found.action, Malformed):
        return LocatedAction(action=found.action, start=None, end=end)
    start = _num_tokens_covering(text[: found.start + 1], token_ids[:end], codec=codec) - 1
    return LocatedAction(action=found.action, start=start, end=end)


def _num_tokens_covering(prefix: str, token_ids: Sequence[int], *, codec: Codec) -> int:
    """The least number of leading tokens whose text begins with `prefix`.

    By bisection over decoded prefixes: a character split over tokens decodes to U+FFFD until its last byte is
    there, but `prefix` ends in a tag's character, which is never split, so the test is monotone.
    """
    return bisect_left(range(len(token_ids)), True, key=lambda n: codec.decode(token_ids[:n]).startswith(prefix))


def _first_pair(text: str) -> _Span | Malformed:
    """The first complete tag pair, or why there is none."""
    open_tags: dict[str, re.Match[str]] = {}
    stray: str | None = None
    for tag in _TAG.finditer(text):
        is_closing, kind = tag[1], tag[2]
        if not is_closing:
            open_tags[kind] = tag
        elif (opening := open_tags.get(kind)) is not None:
            content = text[opening.end() : tag.start()].strip()
            return _Span(action=_action(kind, content), start=opening.start(), end=tag.end())
        elif stray is None:
            stray = kind
    if stray is not None:
        return Malformed(f"</{stray}> came without <{stray}>")
    if open_tags:
        return Malformed(f"<{next(reversed(open_tags))}> was not closed")
    return Malformed("no action was written")


def _action(kind: str, content: str) -> Action:
    if kind == "search":
        return Search(content) if content else Malformed("the query is empty")
    return Answer(content) if content else Malformed("the answer is empty")
