"""What the driver makes of what Ray says of a part that is no more."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray

from rexrag.errors import PartDiedError
from rexrag.run.remote import result_of

pytestmark = pytest.mark.system


def part() -> Any:  # noqa: ANN401
    class Part:  # not of this module, which the workers do not have
        def make(self) -> int:
            time.sleep(600)
            return 1

        def take(self, value: int) -> int:
            return value

    return ray.remote(num_cpus=0)(Part).remote()


def test_a_part_that_waits_for_a_dead_ones_value_tells_of_the_death(ray_session: None) -> None:
    """Which of the two is looked at first is chance: both are deaths."""
    first, second = part(), part()
    assert ray.get([each.take.remote(1) for each in (first, second)], timeout=300) == [1, 1]
    made = first.make.remote()
    taken = second.take.remote(made)
    ray.kill(first)
    for ref in (taken, made):
        with pytest.raises(PartDiedError, match="the test: its process died"):
            result_of(ref, what="the test")
    ray.kill(second)
