"""Parts of a run in this process, without Ray: the real buffer, a learner and a fleet that note what they are asked.

A call of a part runs at once, and its reference holds what came out of it. `Script` notes every call and lets things
happen between two of them: a stop signal, the death of an actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import iscoroutine, isgenerator
from typing import Any

from replay_helpers import make_ipc

from rexrag.buffer.replay_actor import ReplayActor
from rexrag.errors import PartDiedError
from rexrag.learner.learner_actor import Loaded
from rexrag.retrieval.protocol import RetrieverState
from rexrag.run.signals import StopSignal
from rexrag.types import (
    EndReason,
    EpisodeScore,
    FleetReport,
    Question,
    StepBatch,
    StepResult,
    WeightVersion,
)


@dataclass
class LocalRef:
    """What a call returned or raised."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:  # noqa: ANN401
        if self.error is not None:
            raise self.error
        return self.value


@dataclass
class Script:
    """The calls so far, as words, and what happens before the n-th of them."""

    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def note(self, call: str) -> None:
        happening = self.before.pop(len(self.calls), None)
        if happening is not None:
            happening()
        self.calls.append(call)


class LocalActor:
    """An object as its Ray handle looks to `call`."""

    def __init__(self, part: object, *, name: str, script: Script) -> None:
        self._part = part
        self._name = name
        self._script = script

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._part, method), name=f"{self._name}.{method}", script=self._script)


@dataclass
class _Method:
    function: Callable[..., Any]
    name: str
    script: Script

    def options(self, *, num_returns: int) -> _Method:
        assert num_returns > 1
        return self

    def remote(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """The reference to what the method returns, or to each thing that it yields."""
        self.script.note(self.name)
        try:
            result = self.function(*(arg.get() if isinstance(arg, LocalRef) else arg for arg in args), **kwargs)
            if isgenerator(result):
                return [LocalRef(value) for value in result]
            return LocalRef(asyncio.run(result) if iscoroutine(result) else result)
        except Exception as error:  # noqa: BLE001  # as Ray does: whoever asks for the value gets it
            return LocalRef(error=error)


class LocalLearner:
    """Counts steps; `step` asserts that it gets each one once, with as many groups as it should."""

    def __init__(self, *, groups_per_step: int, done: int = 0) -> None:
        self.num_steps = done
        self.saved: list[int] = []
        self._groups_per_step = groups_per_step

    def ready(self) -> Loaded:
        return Loaded("float32", num_buckets=1)

    def rho(self) -> float:
        return 0.18

    def step(self, batch: StepBatch) -> StepResult:
        assert batch.step == self.num_steps + 1
        assert len(batch.groups) == self._groups_per_step
        self.num_steps += 1
        return StepResult(step=batch.step, applied=True, metrics={}, updated=batch.step % 2 == 1)

    def export(self, dtype: str) -> Iterator[dict[str, object]]:
        yield {"weights of step": self.num_steps, "dtype": dtype}
        yield {"proof of step": self.num_steps}

    def save(self, folder: Any) -> Any:  # noqa: ANN401
        path = folder / f"step-{self.num_steps:06d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "COMMIT").write_text("{}")
        self.saved.append(self.num_steps)
        return path


class LocalFleet:
    """Actors that finish every group at once. One that dies is replaced at the next `check`, with current weights."""

    def __init__(self, buffer: ReplayActor, *, version: WeightVersion, script: Script) -> None:
        self._buffer = buffer
        self._script = script
        self._held = version
        self._is_dead = False
        self.num_replaced = 0
        self.evaluations: list[tuple[int, int]] = []
        self.weights: Any = None
        self.dtypes = frozenset({"bfloat16"})

    def die(self) -> None:
        self._is_dead = True

    @property
    def can_begin(self) -> bool:
        return True

    @property
    def is_current(self) -> bool:
        return not self._is_dead

    def run(self) -> None:
        self._script.note("fleet.run")

    def publish(self, version: WeightVersion, weights: Any | None) -> None:  # noqa: ANN401
        self._script.note("fleet.publish")
        self.weights = None if weights is None else weights.buckets[0].get()
        self._held = version

    def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[LocalRef]:
        self._script.note("fleet.evaluate")
        assert version == self._held
        if self._is_dead:
            return [LocalRef(error=PartDiedError("an actor died"))]
        self.evaluations.append((version.step, len(questions)))
        return [LocalRef([score_of(question, version) for question in questions])]

    def num_tokens(self) -> int:
        return 0

    def report(self) -> FleetReport:
        return FleetReport(
            num_wanted=1,
            num_ready=1,
            num_replaced=self.num_replaced,
            tokens_per_s=1.0,
            canary_kl=None,
            switch_s=None,
            proof_s=None,
            num_unproven=0,
        )

    def searches(self) -> RetrieverState:
        return RetrieverState()

    def progressed(self) -> None:
        pass

    def check(self) -> None:
        """What the actors would have done meanwhile."""
        if self._is_dead:
            self._is_dead = False
            self.num_replaced += 1
            asyncio.run(self._buffer.release("a"))
        for lease in asyncio.run(self._buffer.lease("a", num=100, held=self._held, wait_s=0.0)):
            asyncio.run(self._buffer.append("a", lease=lease.key, ipc=make_ipc(lease)))


class LocalSupervisor:
    """Waits for what is there already, and hears the stop signal where a wait may be interrupted."""

    def __init__(self, *, fleet: LocalFleet, stop: StopSignal) -> None:
        self._fleet = fleet
        self._stop = stop
        self._is_ending = False

    def wait(self, ref: LocalRef, *, what: str, progress: object = None, interruptible: bool = True) -> Any:  # noqa: ANN401
        self.look(interruptible=interruptible)
        return ref.get()

    def until(
        self,
        is_done: Callable[[], bool],
        *,
        what: str | Callable[[], str],
        progress: object = None,
        interruptible: bool = True,
        pause_s: float = 0.0,
    ) -> None:
        for _ in range(100):
            if is_done():
                return
            self.look(interruptible=interruptible)
        raise AssertionError(f"never: {what if isinstance(what, str) else what()}")

    def until_current(self, step: int) -> None:
        self.until(lambda: self._fleet.is_current, what="the weights of a step")

    def end(self) -> None:
        self._is_ending = True

    def look_for(self, seconds: float) -> None:
        self.look()

    def look(self, *, interruptible: bool = True) -> None:
        if self._is_ending:
            return
        if interruptible:
            self._stop.heed()
        self._fleet.check()


class LocalReporter:
    """Keeps what it is told."""

    def __init__(self, *, on_evaluation: Callable[[str, int], None]) -> None:
        self.steps: list[int] = []
        self.notes: list[str] = []
        self.evaluations: list[tuple[str, int, int]] = []
        self._on_evaluation = on_evaluation

    def stage(self, name: str) -> None:
        pass

    def end_stage(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def training(self, *, done: int, total: int) -> None:
        pass

    def waiting(self, step: int, *, finished: int, needed: int) -> None:
        pass

    def step(self, result: StepResult, **_: object) -> None:
        self.steps.append(result.step)

    def evaluation(self, scores: Sequence[EpisodeScore], *, split: str, step: int, seconds: float) -> None:
        self.evaluations.append((split, step, len(scores)))
        self._on_evaluation(split, step)


def score_of(question: Question, version: WeightVersion) -> EpisodeScore:
    """Of an episode that is right."""
    return EpisodeScore(
        question_id=question.key,
        data_source=question.data_source,
        hops=None,
        version=version,
        em=1.0,
        f1=1.0,
        num_searches=1,
        num_turns=2,
        num_malformed=0,
        num_tokens=10,
        gold_retrieved=None,
        end_reason=EndReason.ANSWER,
    )
