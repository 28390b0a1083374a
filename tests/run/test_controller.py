"""The main loop, without Ray: in which order it asks whom, and what is left after a stop or a death anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from local_parts import LocalActor, LocalFleet, LocalLearner, LocalRef, LocalReporter, LocalSupervisor, Script
from replay_helpers import make_questions, make_settings

from rexrag.buffer.recovery import accounting_from_log
from rexrag.buffer.replay_actor import ReplayActor
from rexrag.errors import Interrupted, RetrieverError, RunFailure, StalledError
from rexrag.run import controller as controller_module
from rexrag.run.controller import Controller, LoopSettings
from rexrag.run.identity import note_precision
from rexrag.run.signals import StopSignal
from rexrag.run_folder import RunFolder
from rexrag.types import WeightVersion

GROUPS = 2
STEP = [
    "learner.rho", "buffer.assign", "buffer.take", "learner.step", "buffer.outcome", "fleet.publish", "buffer.publish",
]  # fmt: skip


@dataclass
class Rig:
    """A run of the loop over local parts."""

    controller: Controller
    script: Script
    buffer: ReplayActor
    learner: LocalLearner
    fleet: LocalFleet
    reporter: LocalReporter
    stop: StopSignal
    run: RunFolder
    incarnation: str
    supervisor: LocalSupervisor

    def interrupt(self) -> None:
        self.stop.received = "SIGTERM"


def make_rig(
    folder: Path,
    *,
    num_steps: int = 3,
    eval_every: int = 0,
    checkpoint_every: int = 2,
    keep_checkpoints: int = 9,
    checkpoint: Path | None = None,
    guard: Literal["off", "warn", "rewind"] = "off",
    first_step: int = 0,
) -> Rig:
    """`first_step`: that of another run's checkpoint, from which this one goes on."""
    run = RunFolder.create(folder / "run", recipe="mine", seed=0, config="")
    if first_step:
        run.identity.write_text(json.dumps({"origin": {"checkpoint": "elsewhere", "step": first_step}}))
    run.__enter__()
    script, stop = Script(), StopSignal()
    settings = make_settings(run.buffer, groups_per_step=GROUPS, max_staleness=1, first_step=first_step)
    buffer = ReplayActor(settings, resume_step=first_step or None)
    first = WeightVersion(incarnation=asyncio.run(buffer.open()).incarnation, step=first_step)
    learner = LocalLearner(groups_per_step=GROUPS, done=first_step)
    fleet = LocalFleet(buffer, version=first, script=script)

    def evaluated(split: str, step: int) -> None:
        with run.eval.open("a") as file:
            file.write(json.dumps({"split": split, "step": step, "em": 0.5, "n": 4}) + "\n")

    reporter = LocalReporter(on_evaluation=evaluated)
    supervisor = LocalSupervisor(fleet=fleet, stop=stop)
    controller = Controller(
        LoopSettings(
            num_steps=num_steps,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            keep_checkpoints=keep_checkpoints,
            groups_per_step=GROUPS,
            autoscale=None,
            guard=guard,
        ),
        run_folder=run,
        first=first,
        checkpoint=checkpoint,
        buffer=cast("Any", LocalActor(buffer, name="buffer", script=script)),
        learner=cast("Any", LocalActor(learner, name="learner", script=script)),
        fleet=cast("Any", fleet),
        supervisor=cast("Any", supervisor),
        reporter=cast("Any", reporter),
        dev=make_questions(3),
        test=make_questions(4),
    )
    return Rig(controller, script, buffer, learner, fleet, reporter, stop, run, first.incarnation, supervisor)


def without_polls(calls: list[str]) -> list[str]:
    """The calls in order, each run of polls for a batch as one."""
    kept = [call for call in calls if call != "buffer.status"]
    return [call for i, call in enumerate(kept) if call != "buffer.assign" or kept[i + 1] != "buffer.assign"]


def test_a_step_asks_in_this_order(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, num_steps=2, checkpoint_every=9)
    rig.controller.run()
    calls = without_polls(rig.script.calls)
    before = ["learner.ready", "fleet.run", "fleet.evaluate", "fleet.evaluate", "buffer.publish"]
    assert calls[: len(before)] == before
    first, second = calls[len(before) : len(before) + 8], calls[len(before) + 8 :]
    assert first == [*STEP[:5], "learner.export", *STEP[5:]], "weights are exported before they are handed out"
    # Nothing changed in the second step: its version is handed out without weights. It is the last: saved, evaluated.
    assert second == [*STEP[:6], "learner.save", "buffer.settle", "fleet.evaluate", "buffer.publish", "fleet.evaluate"]
    assert rig.fleet.weights is None


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [({"bfloat16"}, "bfloat16"), ({"float32"}, "float32"), ({"bfloat16", "float32"}, "float32")],
)
def test_weights_travel_as_exact_as_the_most_exact_actor_needs_them(
    tmp_path: Path, dtypes: set[str], wanted: str
) -> None:
    rig = make_rig(tmp_path, num_steps=1)
    rig.fleet.dtypes = frozenset(dtypes)
    rig.controller.run()
    assert rig.fleet.weights["dtype"] == wanted


def test_another_precision_than_before_is_told_from_where_the_parts_run(tmp_path: Path) -> None:
    """The learner's and the actors' own words count, not what this machine would choose."""
    rig = make_rig(tmp_path, num_steps=1)
    note_precision(rig.run, {"learner.autocast": "bfloat16", "rollout.dtype": "float32"})
    rig.fleet.dtypes = frozenset({"float32", "bfloat16"})
    rig.controller.run()
    assert rig.reporter.notes == [
        "warning: learner.autocast is float32 on this hardware, and was bfloat16 where the run was before",
        "warning: rollout.dtype is bfloat16 and float32 on this hardware, and was float32 where the run was before",
    ]


def test_the_checkpoint_that_actors_are_built_from_is_kept(tmp_path: Path) -> None:
    """Those that join or are replaced later are built from it; without it each would die at once."""
    origin = tmp_path / "run" / "checkpoints" / "step-000000"
    rig = make_rig(tmp_path, num_steps=4, checkpoint_every=1, keep_checkpoints=1, checkpoint=origin)
    origin.mkdir(parents=True)
    (origin / "COMMIT").write_text("{}")
    rig.controller.run()
    assert [path.name for path in sorted(origin.parent.iterdir())] == ["step-000000", "step-000004"]


def test_evaluations_are_of_the_version_just_pushed(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, num_steps=4, eval_every=2)
    rig.controller.run()
    assert rig.reporter.evaluations == [("test", 0, 4), ("dev", 0, 3), ("dev", 2, 3), ("dev", 4, 3), ("test", 4, 4)]
    assert rig.learner.saved == [2, 4]
    assert rig.reporter.steps == [1, 2, 3, 4]


def num_calls(tmp_path: Path) -> int:
    rig = make_rig(tmp_path, eval_every=1)
    rig.controller.run()
    return len(rig.script.calls)


def at_every_call(tmp_path: Path, happening: Callable[[Rig], Callable[[], None]]) -> list[Rig]:
    """One rig for each call of a whole run, to which something happens just before that call."""
    rigs = []
    for number in range(num_calls(tmp_path / "whole")):
        rig = make_rig(tmp_path / str(number), eval_every=1)
        rig.script.before[number] = happening(rig)
        rigs.append(rig)
    return rigs


def test_a_stop_between_any_two_calls_leaves_whole_steps(tmp_path: Path) -> None:
    stopped = 0
    for rig in at_every_call(tmp_path, lambda rig: rig.interrupt):
        try:
            rig.controller.run()
        except Interrupted:
            stopped += 1
            rig.controller.save()
        done = rig.learner.num_steps
        assert rig.run.record().steps == done or done == 0
        assert (rig.learner.saved or [0])[-1] == done, "what was learnt is saved"
        assert accounting_from_log(rig.run.buffer)["consumed"] == done * GROUPS, "and its groups are consumed"
        assert rig.reporter.steps == list(range(1, done + 1)), "and it was told"
    assert stopped > 10


def test_a_stop_is_heard_while_there_are_no_actors_to_take_new_weights(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, checkpoint_every=9)
    looks = rig.fleet.check

    def gone() -> None:
        if rig.learner.num_steps:
            rig.fleet.die()
            rig.interrupt()
        else:
            looks()

    rig.fleet.check = gone  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        rig.controller.run()
    rig.controller.save()
    assert (rig.learner.saved, rig.reporter.steps) == ([1], [1])
    assert accounting_from_log(rig.run.buffer)["consumed"] == GROUPS


@pytest.mark.parametrize("where", ["calls", "looks"])
def test_what_was_learnt_is_saved_where_other_parts_fail(tmp_path: Path, where: str) -> None:
    """At each call of another part in turn, and at each look after them, the learner's own waits included."""

    def fail() -> None:
        raise RunFailure("it has failed")

    def rig_of(number: int | str) -> tuple[Rig, Script]:
        rig = make_rig(tmp_path / str(number), eval_every=1, checkpoint_every=9)
        if where == "calls":
            return rig, rig.script
        looks, check = Script(), rig.fleet.check

        def look() -> None:
            looks.note(rig.script.calls[-1])
            check()

        rig.fleet.check = look  # type: ignore[method-assign]
        return rig, looks

    whole, happened = rig_of("whole")
    whole.controller.run()
    num_saved = 0
    for number, call in enumerate(happened.calls):
        rig, script = rig_of(number)
        script.before[number] = fail
        with pytest.raises(RunFailure, match="it has failed"):
            rig.controller.run()
        is_unknown = where == "calls" and call == "buffer.outcome"  # then nothing is let go of
        with pytest.raises(ValueError, match="is not over") if is_unknown else nullcontext():
            rig.controller.rescue()
        done = rig.learner.num_steps
        assert rig.learner.saved[-1:] == ([done] if done else []), call
        assert rig.reporter.steps == list(range(1, done + 1)), call
        consumed = accounting_from_log(rig.run.buffer)["consumed"]
        assert consumed == (done - is_unknown) * GROUPS, call
        num_saved += done > 0
    assert num_saved > 10


def test_a_learner_that_hangs_is_not_waited_for_again(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    wait = rig.supervisor.wait

    def stalled(ref: LocalRef, *, what: str, **more: Any) -> Any:  # noqa: ANN401
        if "learner's step 2" in what:
            raise StalledError(what)
        return wait(ref, what=what, **more)

    rig.supervisor.wait = stalled  # type: ignore[method-assign]
    with pytest.raises(StalledError):
        rig.controller.run()
    rig.controller.rescue()
    assert rig.learner.saved == []


def test_the_death_of_an_actor_anywhere_costs_nothing(tmp_path: Path) -> None:
    replaced = 0
    for rig in at_every_call(tmp_path, lambda rig: rig.fleet.die):
        rig.controller.run()
        replaced += rig.fleet.num_replaced
        assert rig.learner.num_steps == 3
        assert rig.reporter.evaluations == [
            ("test", 0, 4), ("dev", 0, 3), ("dev", 1, 3), ("dev", 2, 3), ("dev", 3, 3), ("test", 3, 4),
        ]  # fmt: skip
        assert accounting_from_log(rig.run.buffer)["consumed"] == 3 * GROUPS
    assert replaced > 10


def test_an_evaluation_whose_searches_fail_again_and_again_is_left_out(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, num_steps=1)
    evaluate = rig.fleet.evaluate

    def failing(questions: Any, *, version: WeightVersion) -> Any:  # noqa: ANN401
        refs = evaluate(questions, version=version)
        return refs if version.step else [LocalRef(error=RetrieverError("no answer"))]

    rig.fleet.evaluate = failing  # type: ignore[method-assign]
    rig.controller.run()
    assert rig.reporter.evaluations == [("dev", 1, 3), ("test", 1, 4)]
    assert [note for note in rig.reporter.notes if "left out" in note] == [
        f"warning: the evaluation on {split} at step 0 is left out, a search failed in each of 3 attempts: no answer"
        for split in ("test", "dev")
    ]


def test_a_run_that_may_go_back_to_its_beginning_forgets_nothing_before(tmp_path: Path) -> None:
    """Questions of groups that it forgets would not be asked again in this epoch."""
    settled: dict[str, list[int]] = {}
    guards: tuple[Literal["warn", "rewind"], ...] = ("warn", "rewind")
    for guard in guards:
        rig = make_rig(tmp_path / guard, num_steps=12, checkpoint_every=4, guard=guard)
        settled[guard] = list[int]()

        async def note(step: int, told: list[int] = settled[guard]) -> None:
            told.append(step)

        rig.buffer.settle = note  # type: ignore[method-assign]
        rig.controller.run()
    assert settled == {"warn": [4, 4, 4], "rewind": [0, 4, 4]}, "seen at step 5, a collapse takes it back to step 0"


def test_a_run_that_may_go_back_keeps_a_checkpoint_from_before_the_window(tmp_path: Path) -> None:
    kept = {}
    cases: list[tuple[Literal["warn", "rewind"], int]] = [("warn", 4), ("rewind", 4), ("rewind", 1)]
    for guard, every in cases:
        folder = tmp_path / f"{guard}-{every}"
        rig = make_rig(folder, num_steps=13, checkpoint_every=every, keep_checkpoints=1, guard=guard)
        rig.controller.run()
        kept[guard, every] = sorted(rig.run.committed_checkpoints())
    assert kept["warn", 4] == [13]
    assert kept["rewind", 4] == [8, 12, 13], "a collapse seen at step 14 began at step 10"
    assert kept["rewind", 1] == [9, 10, 11, 12, 13]


def begin(rig: Rig) -> None:
    """The actors begin what they can, and finish nothing."""
    held = WeightVersion(incarnation=rig.incarnation, step=0)
    asyncio.run(rig.buffer.lease("a", num=100, held=held, wait_s=0.0))


def test_a_step_whose_groups_never_end_says_what_the_buffer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(tmp_path)
    monkeypatch.setattr(rig.fleet, "check", lambda: begin(rig))
    monkeypatch.setattr(controller_module, "ASSIGN_POLL_S", 0.0)
    with pytest.raises(AssertionError, match=r"never: .* groups of step 1: 0 of 2 are finished, 4 are begun, 0 wait"):
        rig.controller.run()


def test_a_run_that_goes_on_from_anothers_checkpoint_is_evaluated_before_and_after(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, num_steps=5, first_step=3)
    rig.controller.run()
    assert rig.reporter.evaluations == [("test", 3, 4), ("dev", 3, 3), ("dev", 5, 3), ("test", 5, 4)]


def test_what_eval_jsonl_has_is_not_evaluated_again(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, num_steps=1)
    rig.run.eval.write_text(json.dumps({"split": "dev", "step": 1, "em": 0.5, "n": 4}) + "\n")
    rig.controller.run()
    assert ("dev", 1, 3) not in rig.reporter.evaluations
    assert ("test", 1, 4) in rig.reporter.evaluations
