"""What ends a rollout loop, and what is only counted."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from rexrag.actors.rollout_loop import RolloutLoop
from rexrag.actors.runner import EpisodeRunner
from rexrag.engine.protocol import Engine
from rexrag.errors import ConfigError, RetrieverSetupError
from rexrag.types import GroupLease, Question, WeightVersion

VERSION = WeightVersion(incarnation="1", step=0)
QUESTION = Question(id="1", data_source="test", question="q", golden_answers=("a",))


class Buffer:
    """Hands out groups without end, and notes which failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._given = 0

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]:
        await asyncio.sleep(0)
        self._given += num
        numbers = range(self._given - num, self._given)
        return [GroupLease(group_id=str(n), question=QUESTION, epoch=0, attempt=0, version=VERSION) for n in numbers]

    async def renew(self, actor_id: str, *, progress: Mapping[str, int]) -> Sequence[str]:
        return []

    async def append(self, actor_id: str, *, group_id: str, ipc: bytes) -> str:
        raise AssertionError("no group is finished here")

    async def fail(self, actor_id: str, *, group_id: str, reason: str) -> None:
        self.failed.append(group_id)


class BreakingRunner:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def run_group(self, lease: GroupLease, **columns: object) -> None:
        await asyncio.sleep(0)
        raise self._error


class IdleEngine:
    version = VERSION


@pytest.mark.parametrize("error", [RetrieverSetupError("u: status 401 (who?)"), ConfigError("reward.kind raised")])
def test_settings_that_no_group_can_be_produced_under_end_the_run_at_once(error: Exception) -> None:
    buffer = Buffer()
    loop = RolloutLoop(
        cast("EpisodeRunner", BreakingRunner(error)),
        actor_id="rollout-0",
        engine=cast("Engine", IdleEngine()),
        buffer=buffer,
        num_groups=2,
    )
    with pytest.raises(type(error)) as raised:
        asyncio.run(asyncio.wait_for(loop.run(), timeout=5))
    assert raised.value is error
    assert buffer.failed == []
