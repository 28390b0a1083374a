"""The gold answers of a question's row, under the names and in the forms that the field's data sets give them."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Final

import numpy as np

from rexrag.data.rows import RowError, shown, valid_text

COLUMNS: Final = ("golden_answers", "answers", "answer", "possible_answers")
"""Columns of a row's own, the first that is there counts: FlashRAG, NQ and SQuAD, HotpotQA and TriviaQA, PopQA."""
_MODELS: Final = ("reward_model", "reward_spec")
"""Search-R1 and verl, SkyRL: `ground_truth`, which is an answer itself, or has it as `target`."""
_MORE: Final = {"answer": ("answer_aliases", "aliases")}
"""Columns with further answers beside one: MuSiQue."""
_INSIDE: Final = ("target", "value", "text", "aliases")
"""Where an object has its answers: Search-R1, TriviaQA, SQuAD."""
_BARE_LIST: Final = re.compile(r"\[[-+.\d\s]+(?:,[-+.\d\s]+)+\]")
_PIECE: Final = re.compile(r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<bare>[-+.\w]+)|\s+|,""", re.DOTALL)


def golden_answers(values: Mapping[str, object]) -> tuple[str, ...]:
    """All gold answers of a row, none of them blank, each once.

    `reward_model.ground_truth` comes before `golden_answers` and the others. Numbers are answers as texts; an
    answer that is the text of a list (`'["A", "B"]'`) is read as the list.

    Raises:
        RowError: no answer in any place, or something that is none.
    """
    name, found = _find(values)
    texts = _texts(found, name)
    for more in _MORE.get(name, ()):
        texts += _texts(values.get(more), more)
    kept = tuple(dict.fromkeys(valid_text(text.strip(), name) for text in texts if text.strip()))
    if not kept:
        raise RowError(f'expected at least one non-empty answer in "{name}", got {shown(found)}')
    return kept


def has_bare_list(values: Mapping[str, object]) -> bool:
    """Whether a text of numbers in brackets is read as several answers: an interval looks like a list of years."""
    _, found = _find(values)
    texts = found if isinstance(found, list | tuple) else [found]
    return any(isinstance(text, str) and _BARE_LIST.fullmatch(text.strip()) is not None for text in texts)


def listed_in(text: str) -> list[str] | None:
    """The items of the text of a list, as JSON, Python or numpy writes it; None for any other text."""
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")):
        return None
    try:
        items = json.loads(body)
    except (ValueError, RecursionError):
        return _python_items(body[1:-1])
    plain = isinstance(items, list) and all(item is None or isinstance(item, str | int | float) for item in items)
    return [kept for item in items if (kept := _number_or_text(item)) is not None] if plain else None


def _find(values: Mapping[str, object]) -> tuple[str, object]:
    for model in _MODELS:
        outer = values.get(model)
        truth = outer.get("ground_truth") if isinstance(outer, Mapping) else None
        if isinstance(truth, Mapping) and "target" in truth:
            if truth["target"] is not None:
                return f"{model}.ground_truth.target", truth["target"]
        elif truth is not None:
            return f"{model}.ground_truth", truth
    for name in COLUMNS:
        if values.get(name) is not None:
            return name, values[name]
    raise RowError(
        f'expected a string or a list of strings in "golden_answers" (or reward_model.ground_truth.target, '
        f"{', '.join(COLUMNS[1:])}), got nothing; the columns are {', '.join(sorted(map(str, values))) or 'none'}"
    )


def _texts(value: object, name: str) -> list[str]:
    """All texts in a value: text, number, list of them, or an object that has them in a known place."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        items = listed_in(value)
        return [value] if items is None else items
    if isinstance(value, Mapping):
        places = [key for key in _INSIDE if value.get(key) is not None]
        if not places:
            raise RowError(f'expected an answer as {", ".join(_INSIDE)} in "{name}", got {shown(value)}')
        return [text for key in places for text in _texts(value[key], f"{name}.{key}")]
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            raise RowError(f'expected a string or a list of strings in "{name}", got {shown(value)}')
        return [text for item in value for text in _texts(item, name)]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise RowError(f'expected a string or a list of strings in "{name}", got {shown(value)}')
    text = _number_or_text(value)
    return [] if text is None else [text]


def _number_or_text(value: object) -> str | None:
    """A plain value as text, as a person writes it: 1985 for 1985.0; None for a gap."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _python_items(body: str) -> list[str] | None:
    """Items as Python writes them (`'A', "B"`), or numpy (`'A' 'B'`, which Python would join to one)."""
    items: list[str] = []
    at = 0
    while at < len(body):
        piece = _PIECE.match(body, at)
        if piece is None:
            return None
        at = piece.end()
        if piece["quoted"]:
            try:
                items.append(str(ast.literal_eval(piece["quoted"])))
            except (ValueError, SyntaxError):
                return None
        elif piece["bare"]:
            if piece["bare"] in ("None", "nan"):
                continue
            if not re.fullmatch(r"[-+]?\d*\.?\d+", piece["bare"]):
                return None
            items.append(piece["bare"])
    return items
