"""What the environment writes into a trajectory: passages, and feedback on malformed turns.

Passages are data: nothing in them may read as a control tag or as a special token of the chat template.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice
from typing import Final, NamedTuple

from rexrag.env.actions import Malformed
from rexrag.env.codec import Codec
from rexrag.errors import ConfigError, counted
from rexrag.types import Passage

_CONTROL_TAG: Final = re.compile(r"<([\s/]*(?:think|search|information|answer|action)[\s/]*)>", re.IGNORECASE)
_WORD: Final = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\s\u2e80-\u9fff\uf900-\ufaff]+")
"""A word ends at white space; scripts that write none may be cut after any character."""


def neutralize(text: str, *, special_tokens: Sequence[str] = ()) -> str:
    """A text in which nothing reads as a control tag or as one of the special tokens.

    Tags (`<think>`, `<search>`, `<information>`, `<answer>`, `<action>`, their closings and self-closing forms,
    any case, any spacing inside the brackets) get square brackets; special tokens get a space after their first
    character. A text without such a tag or token is returned as it is, so the function is idempotent.
    """
    return break_special_tokens(_CONTROL_TAG.sub(r"[\1]", text), special_tokens=special_tokens)


def break_special_tokens(text: str, *, special_tokens: Sequence[str]) -> str:
    """A text without any of the special tokens: a space is put after the first character of each.

    Special tokens of one character, or with white space in them, cannot be broken so; they are left to the
    codec, which never reads special tokens out of data.
    """
    tokens = [token for token in special_tokens if len(token) > 1 and not any(map(str.isspace, token))]
    if not any(token in text for token in tokens):
        return text
    pattern = re.compile("|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens))
    return pattern.sub(" ", text)


REFUSAL: Final = (
    "\n\nThe search was refused: the query is too long or not a plain one. "
    "Write another <search>query</search> or <answer>text</answer>.\n\n"
)
"""The text that answers a search whose query the retriever does not take."""


def format_observation(passages: Sequence[Passage], *, special_tokens: Sequence[str] = ()) -> str:
    """The text of an observation that shows the passages whole: what `render_observation` tokenises."""
    return _wrap([header + text for header, text in _passage_pieces(passages, special_tokens=special_tokens)])


def format_feedback(malformed: Malformed) -> str:
    """The text that answers a malformed turn."""
    return (
        f"\n\nThat was no valid action: {malformed.reason}. Write <search>query</search> or <answer>text</answer>.\n\n"
    )


def render_feedback(malformed: Malformed, *, codec: Codec) -> list[int]:
    """Token ids of the feedback on a malformed turn: what was wrong, and what is allowed."""
    return codec.encode(format_feedback(malformed))


def render_refusal(*, codec: Codec) -> list[int]:
    """Token ids of the feedback on a search whose query the retriever does not take."""
    return codec.encode(REFUSAL)


class Observation(NamedTuple):
    """Token ids, and how many passages, from the first on, have any text in them."""

    ids: list[int]
    num_shown: int


def render_observation(passages: Sequence[Passage], *, codec: Codec, max_tokens: int) -> Observation:
    """`Doc i(Title: …) text` per passage, in `<information>`, in at most `max_tokens` tokens.

    As many whole passages as fit, then as many words of the next one as fit (at least one word of its text, else
    it is left out; of the first passage anything that fits is shown). The closing tag always survives.

    Raises:
        ConfigError: `max_tokens` does not hold the tags alone.
    """
    ids = codec.encode(_wrap([]))
    if len(ids) > max_tokens:
        raise ConfigError(
            f"env.max_observation_tokens = {max_tokens} does not hold the <information> tags alone, "
            f"{counted(len(ids), 'token')} with this tokenizer; raise it"
        )
    shown: list[str] = []
    # One passage after the other: of a hundred of them, or a whole book, only what fits is ever tokenised.
    for header, text in _passage_pieces(passages, special_tokens=codec.special_tokens):
        longer = None
        if next(islice(_WORD.finditer(text), _most_words(max_tokens), None), None) is None:
            longer = codec.encode(_wrap([*shown, header + text]))
        if longer is None or len(longer) > max_tokens:
            cut = _longest_cut(shown, header, text, codec=codec, max_tokens=max_tokens)
            return Observation(ids, len(shown)) if cut is None else Observation(cut, len(shown) + 1)
        shown.append(header + text)
        ids = longer
    return Observation(ids, len(shown))


def _most_words(max_tokens: int) -> int:
    """Words that certainly do not fit: a token seldom spans two."""
    return 2 * max_tokens


def _longest_cut(shown: Sequence[str], header: str, text: str, *, codec: Codec, max_tokens: int) -> list[int] | None:
    """Token ids of `shown` and as many words of one more passage as fit; None where nothing does."""
    passage = header + text
    words = (word.end() for word in _WORD.finditer(passage) if word.end() > len(header) or not shown)
    ends = list(islice(words, _most_words(max_tokens)))

    def encode(num_words: int) -> list[int]:
        return codec.encode(_wrap([*shown, passage[: ends[num_words - 1]]]))

    num_words = bisect_right(range(1, len(ends) + 1), max_tokens, key=lambda n: len(encode(n)))
    # A longer text may be fewer tokens where words merge, so the bisection only comes close.
    while num_words > 0:
        if len(ids := encode(num_words)) <= max_tokens:
            return ids
        num_words -= 1
    return None


def _passage_pieces(passages: Sequence[Passage], *, special_tokens: Sequence[str]) -> list[tuple[str, str]]:
    """(header, text) of each passage, neutralised; the passage is the two joined."""
    pieces = []
    for number, passage in enumerate(passages, start=1):
        header = neutralize(f"Doc {number}(Title: {passage.title.strip()})", special_tokens=special_tokens)
        pieces.append((f"{header} ", neutralize(passage.text.strip(), special_tokens=special_tokens)))
    return pieces


def _wrap(passages: Sequence[str]) -> str:
    return "\n\n<information>" + "\n".join(passages) + "</information>\n\n"
