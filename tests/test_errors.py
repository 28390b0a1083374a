"""Errors cross processes: whatever class, it arrives as what it was."""

from __future__ import annotations

import pickle

import pytest

import rexrag.actors.rollout_actor
import rexrag.learner.learner_actor
import rexrag.run.train  # noqa: F401  # so that the classes of all parts exist
from rexrag.errors import RexragError


def all_errors(base: type[RexragError] = RexragError) -> list[type[RexragError]]:
    return [base, *(found for below in base.__subclasses__() for found in all_errors(below))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_errors_pickle(kind: type[RexragError]) -> None:
    error = kind("key = 3: must be at most 2; lower it")
    error.__cause__ = OSError("lost")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == str(error)
