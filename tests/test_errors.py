"""Errors cross processes: whatever class, it arrives as what it was."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import rexrag.actors.rollout_actor
import rexrag.learner.learner_actor
import rexrag.run.train  # noqa: F401  # so that the classes of all parts exist
from rexrag.errors import RexragError, counted

ROOT = Path(__file__).resolve().parent.parent


def all_errors(base: type[RexragError] = RexragError) -> list[type[RexragError]]:
    return [base, *(found for below in base.__subclasses__() for found in all_errors(below))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_errors_pickle(kind: type[RexragError]) -> None:
    error = kind("key = 3: must be at most 2; lower it")
    error.__cause__ = OSError("lost")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == str(error)


def test_a_number_has_the_right_form_of_its_noun() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted(1_500_000, "passage") == "1500000 passages"
    assert [counted(n, "GPU") for n in (1.0, 0.5)] == ["1 GPU", "0.5 GPUs"]
    assert [counted(n, "entry", "entries") for n in (1, 3)] == ["1 entry", "3 entries"]


COUNTED = re.compile(
    r" (?:(?!has )[a-z]+ )?(?:problems|rows|questions|passages|steps|groups|actors|weights|tokens|bytes|demonstrations|"
    r"segments|hints|targets|times|entries|files|parameters|CPUs|GPUs|threads|lines|errors|turns|words|offsets)\b(?!/)"
)
"""What is counted in messages, as a plural."""
NEVER_ONE = ("rexrag/types.py", "rexrag/engine/", "rexrag/learner/")
"""Where a message is of numbers that no user sees, or that are large."""


def numbers_before_plurals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for value, text in pairwise(node.values):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                    number = ast.unparse(value.value)
                    is_word = (
                        number in ("split", "reason")
                        or number.isupper()
                        or "encoding" in number
                        or number.endswith("_prefix")
                    )
                    if not is_word and COUNTED.match(str(text.value)):
                        yield f"{path.relative_to(ROOT)}:{value.lineno}: {number}{text.value!s}"
        elif isinstance(node, ast.Constant) and re.search(rf"%[dg]{COUNTED.pattern}", str(node.value)):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"


def test_no_message_puts_a_number_before_a_plural_by_itself() -> None:
    paths = (ROOT / "rexrag").rglob("*.py")
    seen = [path for path in paths if not str(path.relative_to(ROOT)).startswith(NEVER_ONE)]
    assert not [found for path in seen for found in numbers_before_plurals(path)]
