"""Hundreds of actors in virtual time: who waits for whom, by the number of actors, their stragglers, and the staleness.

    pip install 'rexrag[plots]'
    python benchmarks/simulate.py [--out FILE.json] [--plot FILE.svg]

The real controller and the real state of the buffer, with its admission and its choice of a step's groups; the actors
and the learner are simulated. An actor works on one group at a time, for a log-normal time with mean 1; the learner's
step takes 1 and is for 64 groups, so that 64 actors make as much as it takes. New weights reach an actor after 0.05.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

from buffer import group_of, settings_of
from machine import origin

from rexrag.buffer.ledger import Ledger
from rexrag.buffer.records import Begin, Record
from rexrag.buffer.state import ReplayState
from rexrag.buffer.status import BufferStatus
from rexrag.learner.learner_actor import Loaded
from rexrag.run.controller import Controller, LoopSettings
from rexrag.run_folder import RunFolder
from rexrag.types import FleetReport, GroupLease, StepBatch, StepResult, WeightVersion

GROUPS_PER_STEP: Final = 64
NUM_STEPS: Final = 28
NUM_FIRST: Final = 8
"""Steps that fill the buffer, and count for nothing."""
STEP_TIME: Final = 1.0
PUSH_TIME: Final = 0.05
NUM_ACTORS: Final = (16, 32, 64, 96, 128, 256)
STALENESS: Final = (0, 1, 2, 4)
SPREADS: Final = (0.25, 1.0)
"""Standard deviations of a group's log time: at 1.0 one group in a hundred takes six times the mean."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One setting. `rate`: steps over those of a learner that never waits; `idle`: share of its time that it waits.

    `staleness`: mean age of the groups trained on, steps; `buffer_us`: time of the buffer's state for a group, with its
    share of all calls.
    """

    actors: int
    max_staleness: int
    spread: float
    rate: float
    bound: float
    idle: float
    staleness: float
    stale: int
    buffer_us: float


@dataclass
class Journal:
    """Keeps what is written for as long as it is asked about."""

    number: int = 1
    is_full: bool = False
    last: Sequence[Record] = ()

    def write(self, records: Sequence[Record]) -> None:
        self.last = records

    def roll(self, head: Record) -> None:
        raise AssertionError("it is never full")


@dataclass
class Value:
    """A reference whose value is there."""

    value: Any

    def get(self) -> Any:  # noqa: ANN401
        return self.value


class Actor:
    """An object as its Ray handle looks to the controller; a call runs at once."""

    def __init__(self, part: object) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return _Method(getattr(self._part, name))


@dataclass
class _Method:
    function: Callable[..., Any]
    num_returns: int | None = None

    def options(self, *, num_returns: int) -> _Method:
        return _Method(self.function, num_returns)

    def remote(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        if self.num_returns is not None:
            return [Value(value) for value in self.function(*args, **kwargs)]
        return Value(self.function(*(arg.get() if isinstance(arg, Value) else arg for arg in args), **kwargs))


@dataclass
class World:
    """Virtual time, and what happens in it."""

    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    count: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, when: float, happening: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.count), happening))

    def advance(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, happening = heapq.heappop(self.events)
            happening()
        self.now = until


class Buffer:
    """The buffer's state behind the methods that the controller calls; its own time is counted."""

    def __init__(self, state: ReplayState) -> None:
        self.state = state
        self.seconds = 0.0

    def timed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        began = time.perf_counter()
        result = method(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return result

    def assign(self, step: int, *, rho: float | None, timeout_s: float) -> bool:
        return bool(self.timed(self.state.assign, step, rho=rho))

    def take(self, step: int) -> StepBatch:
        return cast("StepBatch", self.timed(self.state.take, step))

    def outcome(self, step: int, *, applied: bool) -> None:
        self.timed(self.state.outcome, step, applied=applied)

    def publish(self, version: WeightVersion) -> None:
        self.timed(self.state.publish, version)

    def settle(self, step: int) -> None:
        self.timed(self.state.settle, step)

    def status(self) -> BufferStatus:
        return self.state.status()


class Learner:
    """Takes its time for a step, and notes when it had to wait and how old its groups were."""

    def __init__(self, world: World, state: ReplayState) -> None:
        self._world = world
        self._state = state
        self.began: list[float] = []
        self.ended: list[float] = []
        self.ages: list[float] = []

    def ready(self) -> Loaded:
        return Loaded("float32", num_buckets=0)

    def rho(self) -> None:
        return None

    def step(self, batch: StepBatch) -> StepResult:
        groups = self._state._ledger.groups
        chosen = [groups[group_id] for group_id in self._state._ledger.steps[batch.step]]
        self.ages.append(statistics.mean(batch.step - 1 - (group.min_version or 0) for group in chosen))
        self.began.append(self._world.now)
        self._world.advance(self._world.now + STEP_TIME)
        self.ended.append(self._world.now)
        return StepResult(step=batch.step, applied=True, metrics={}, updated=True)

    def export(self, dtype: str) -> list[None]:
        return [None]

    def save(self, folder: Path) -> Path:
        path = folder / f"step-{len(self.ended):06d}"
        path.mkdir(parents=True)
        (path / "COMMIT").write_text("{}")
        return path


class Fleet:
    """Actors that lease, work for a while, append, and lease again."""

    def __init__(self, world: World, buffer: Buffer, *, num: int, spread: float, version: WeightVersion) -> None:
        self._world = world
        self._buffer = buffer
        self._draw = random.Random(0)
        self._spread = spread
        self._held = [version] * num
        self._idle: dict[int, None] = {}

    can_begin = is_current = True
    dtypes = frozenset({"float32"})
    num_wanted = property(lambda self: len(self._held))

    def run(self) -> None:
        self._idle = dict.fromkeys(range(len(self._held)))

    def publish(self, version: WeightVersion, weights: object) -> None:
        def arrive() -> None:
            self._held = [version] * len(self._held)
            self.serve()

        self._world.at(self._world.now + PUSH_TIME, arrive)

    def serve(self) -> None:
        """Give those that wait what there is to lease."""
        for actor in list(self._idle):
            if not self._buffer.state.num_leasable:
                return
            for lease in self._buffer.timed(self._buffer.state.lease, f"{actor}", num=1, held=self._held[actor]):
                del self._idle[actor]
                self._begin(actor, lease)

    def _begin(self, actor: int, lease: GroupLease) -> None:
        def finish() -> None:
            ipc = group_of(lease, shape=(1, 12))
            self._buffer.timed(self._buffer.state.append, f"{actor}", lease=lease.key, ipc=ipc)
            self._idle[actor] = None
            self.serve()

        mean = -(self._spread**2) / 2
        self._world.at(self._world.now + self._draw.lognormvariate(mean, self._spread), finish)

    def num_tokens(self) -> int:
        return 0

    def report(self) -> FleetReport:
        num = len(self._held)
        return FleetReport(
            num_wanted=num,
            num_ready=num,
            num_replaced=0,
            tokens_per_s=0.0,
            canary_kl=None,
            switch_s=None,
            proof_s=None,
            num_unproven=0,
        )

    def searches(self) -> None:
        return None

    def progressed(self) -> None:
        pass


class Supervisor:
    """Lets time pass where the controller waits."""

    def __init__(self, world: World, fleet: Fleet) -> None:
        self._world = world
        self._fleet = fleet

    def wait(self, ref: Value, **_: object) -> Any:  # noqa: ANN401
        return ref.get()

    def until(self, is_done: Callable[[], bool], *, what: str | Callable[[], str], **_: object) -> None:
        while not is_done():
            self._fleet.serve()
            if not self._world.events:
                raise AssertionError(f"nothing will ever happen: {what if isinstance(what, str) else what()}")
            self._world.advance(self._world.events[0][0])

    def until_current(self, step: int) -> None:
        assert self._fleet.is_current, f"actors have the weights of step {step} as soon as they arrive"


class Quiet:
    """Hears what a reporter is told."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    words = parser.parse_args()
    results = []
    for spread, max_staleness, num_actors in itertools.product(SPREADS, STALENESS, NUM_ACTORS):
        results.append(simulate(num_actors, max_staleness=max_staleness, spread=spread, num_steps=words.steps))
        print(json.dumps(asdict(results[-1])), flush=True)
    if words.out is not None:
        told = {
            **origin(),
            "groups_per_step": GROUPS_PER_STEP,
            "steps": words.steps - NUM_FIRST,
            "results": [asdict(result) for result in results],
        }
        words.out.write_text(json.dumps(told, indent=1) + "\n")
    if words.plot is not None:
        plot(results, path=words.plot)


def simulate(num_actors: int, *, max_staleness: int, spread: float, num_steps: int) -> Result:
    """A run in virtual time."""
    with (
        TemporaryDirectory() as folder,
        RunFolder.create(Path(folder) / "run", recipe="simulated", seed=0, config="") as run,
    ):
        world = World()
        settings = settings_of(
            Path(folder) / "log", num_groups=GROUPS_PER_STEP, num_questions=1000, max_staleness=max_staleness
        )
        ledger = Ledger()
        ledger.apply(Begin(incarnation="1", resume_step=0, num_questions=1000, questions_hash=""))
        state = ReplayState(settings, ledger=ledger, journal=Journal(), clock=lambda: world.now)
        buffer, learner, first = Buffer(state), Learner(world, state), WeightVersion(incarnation="1", step=0)
        fleet = Fleet(world, buffer, num=num_actors, spread=spread, version=first)
        loop = LoopSettings(
            num_steps=num_steps,
            checkpoint_every=10,
            eval_every=0,
            keep_checkpoints=1,
            groups_per_step=GROUPS_PER_STEP,
            autoscale=None,
            guard="off",
        )
        controller = Controller(
            loop,
            run_folder=run,
            first=first,
            checkpoint=None,
            buffer=cast("Any", Actor(buffer)),
            learner=cast("Any", Actor(learner)),
            fleet=cast("Any", fleet),
            supervisor=cast("Any", Supervisor(world, fleet)),
            reporter=cast("Any", Quiet()),
            dev=(),
            test=(),
        )
        controller.run()
    span = learner.ended[-1] - learner.ended[NUM_FIRST - 1]
    num_counted = num_steps - NUM_FIRST
    return Result(
        actors=num_actors,
        max_staleness=max_staleness,
        spread=spread,
        rate=round(num_counted * STEP_TIME / span, 3),
        bound=round(min(1.0, num_actors / GROUPS_PER_STEP), 3),
        idle=round(1 - num_counted * STEP_TIME / span, 3),
        staleness=round(statistics.mean(learner.ages[NUM_FIRST:]), 2),
        stale=state.accounting()["dropped"].get("stale", 0),
        buffer_us=round(buffer.seconds / (num_steps * GROUPS_PER_STEP) * 1e6),
    )


def plot(results: Sequence[Result], *, path: Path) -> None:
    """How busy the learner is, by the number of actors: a panel for each spread of their times."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("svg")
    plt.rcParams["svg.hashsalt"] = "rexrag"
    figure, panels = plt.subplots(1, len(SPREADS), figsize=(9.0, 3.2), layout="constrained", sharey=True)
    for spread, panel in zip(SPREADS, panels, strict=True):
        for max_staleness in STALENESS:
            mine = [r for r in results if (r.spread, r.max_staleness) == (spread, max_staleness)]
            panel.plot([r.actors for r in mine], [1 - r.idle for r in mine], marker="o", label=f"S = {max_staleness}")
        panel.plot([r.actors for r in mine], [r.bound for r in mine], color="grey", linestyle=":", label="bound")
        panel.set(xlabel="actors", xscale="log", ylim=(0, 1.05), title=f"spread of a group's time {spread}")
        panel.set_xticks(NUM_ACTORS, [f"{num}" for num in NUM_ACTORS])
        panel.minorticks_off()
    panels[0].set_ylabel("share of time the learner works")
    panels[-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
