"""The main loop: take, step, outcome, push, record, checkpoint, evaluate, publish, until the last step.

    RolloutActor x N ──append──▶ ReplayActor ──take(step)──▶ LearnerActor ──export──▶ RolloutActor x N
          ▲                          │ lease                                              │
          └──────────────────────────┘◀──────────────── publish(version) ────────────────┘

What each loop waits for, and what unblocks it:
    rollout actor   a lease: admission (bounded staleness), opened by `publish`; weights, pushed after each step
    assign          groups_per_step finished groups, and no older group left behind; unblocked by `append`
    step            the learner's optimizer step; nothing else runs in the learner
    evaluate        greedy episodes under the version just pushed, before the next step is taken
Every wait looks after the parts meanwhile (`Supervisor`): a dead rollout actor is replaced, a dead buffer or
learner ends the run with its cause, and a stop signal is heard. `run/train.py` makes and wires the parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from rexrag.buffer.replay_actor import ReplayActor
from rexrag.buffer.status import BufferStatus
from rexrag.errors import CollapsedError, PartDiedError, RetrieverError, RexragError, StalledError, counted
from rexrag.files import read_jsonl
from rexrag.learner.checkpoint import prune
from rexrag.learner.learner_actor import LearnerActor, ask_progress, start_export
from rexrag.reporting.log_file import log_instead
from rexrag.reporting.reporter import Reporter
from rexrag.run.autoscale import Autoscaler, StepLoad
from rexrag.run.evaluation import MAX_ATTEMPTS, evaluate
from rexrag.run.fleet import Fleet
from rexrag.run.guard import WINDOW, Guard
from rexrag.run.identity import first_step_of, note_precision
from rexrag.run.remote import Handle, Ref, T, call, peek, value_of
from rexrag.run.rewind import note_collapse
from rexrag.run.supervisor import Supervisor
from rexrag.run_folder import RunFolder
from rexrag.types import FleetReport, Question, StepBatch, StepResult, WeightVersion

LOG = logging.getLogger(__name__)

ASSIGN_POLL_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Of the main loop."""

    num_steps: int
    checkpoint_every: int
    eval_every: int
    keep_checkpoints: int
    groups_per_step: int
    autoscale: tuple[int, int] | None
    guard: Literal["off", "warn", "rewind"]


@dataclass(frozen=True, kw_only=True)
class _UnderWay:
    """A step that the learner was asked for. `learner_wait_s`: seconds that it had waited for its groups."""

    step: int
    result: Ref[StepResult]
    began: float
    learner_wait_s: float


class Controller:
    """Takes groups, steps the learner, publishes weights, evaluates and checkpoints, until the last step.

    Life: `run` once; `save` after `Interrupted`.

    Args:
        first: the version of the weights that learner and actors were built with.
        checkpoint: where these weights are, for actors that join or are replaced later; None: no checkpoint of the run.
        dev, test: questions of `data.dev` and `data.eval`.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        run_folder: RunFolder,
        first: WeightVersion,
        checkpoint: Path | None,
        buffer: Handle[ReplayActor],
        learner: Handle[LearnerActor],
        fleet: Fleet,
        supervisor: Supervisor,
        reporter: Reporter,
        dev: Sequence[Question],
        test: Sequence[Question],
    ) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._first_step = first_step_of(run_folder)
        self._version = first
        self._origin = [] if checkpoint is None else [checkpoint]
        self._buffer = buffer
        self._learner = learner
        self._fleet = fleet
        self._supervisor = supervisor
        self._reporter = reporter
        self._questions = {"dev": dev, "test": test}
        self._saved_step = first.step
        self._under_way: _UnderWay | None = None
        self._is_learner_stuck = False
        bounds = settings.autoscale
        self._guard = Guard(read_jsonl(run_folder.metrics))
        self._autoscaler = None if bounds is None else Autoscaler(least=bounds[0], most=bounds[1])

    def run(self) -> None:
        """All steps that are left, with the evaluations before, between and after.

        Raises:
            RunFailure: a part died or stalled.
            Interrupted: a stop signal came; `save` keeps what was finished.
        """
        first = self._version.step
        loaded = call(self._learner, LearnerActor.ready)
        precision, self._num_buckets = self._wait(loaded, what="the run waits for the learner to load its model")
        self._supervisor.until(
            lambda: self._fleet.can_begin,
            what="the run waits for its rollout actors to start",
            progress=lambda: self._fleet.num_working,
        )
        self._tell_precision(precision)
        self._fleet.run()
        if first == self._first_step:
            self._evaluate("test")
        if self._has_evaluation(first):
            self._evaluate("dev")
        self._reporter.training(done=first, total=self._settings.num_steps)
        self._publish()
        while self._version.step < self._settings.num_steps:
            self._step(self._version.step + 1)
        self._evaluate("test")

    def save(self) -> None:
        """A checkpoint of the last finished step, unless there is one, whatever has become of the other parts."""
        self._supervisor.end()
        if self._saved_step != self._version.step:
            self._checkpoint()

    def rescue(self) -> None:
        """After a failure: `save`, with the step that is under way; nothing where the learner hangs or has failed."""
        if self._is_learner_stuck:
            return
        self._supervisor.end()
        if (under_way := self._under_way) is not None:
            with suppress(PartDiedError):  # of the learner, which `save` meets too, or of who had the batch
                result = self._finished(under_way)
                with log_instead(RexragError):
                    self._note_outcome(result)
                self._tell(result, under_way)
        self.save()

    def _tell_precision(self, learner: str) -> None:
        """What the parts compute in where they run, if that is not what the run began with."""
        actors = " and ".join(sorted(self._fleet.dtypes))
        for told in note_precision(self._run_folder, {"learner.autocast": learner, "rollout.dtype": actors}):
            self._warn(told)

    def _warn(self, told: str) -> None:
        self._reporter.note(f"warning: {told}")
        LOG.warning("%s", told)

    def _step(self, step: int) -> None:
        began = time.monotonic()
        asked = call(self._learner, LearnerActor.rho)
        rho = self._wait_for_learner(asked, what="the run waits for the learner to tell ρ")
        free_at = time.monotonic()  # it has handed out the weights of the step before
        batch = self._take(step, rho=rho)
        waited_s = time.monotonic() - free_at
        # Until the outcome is noted nothing is interrupted: the step counts, or it does not.
        made = call(self._learner, LearnerActor.step, value_of(batch))
        under_way = self._under_way = _UnderWay(step=step, result=made, began=began, learner_wait_s=waited_s)
        result = self._finished(under_way)
        try:
            self._note_outcome(result)
            collapse = self._collapse(result)
            if collapse is None:
                self._push(updated=result.updated)
        except BaseException:
            with log_instead(OSError):  # what ended the step has more to say
                self._tell(result, under_way)
            raise
        fleet, step_s = self._tell(result, under_way)
        if collapse is not None:
            raise collapse
        self._autoscale(wait_share=waited_s / step_s, num_ready=fleet.num_ready)
        if step % self._settings.checkpoint_every == 0 or step == self._settings.num_steps:
            self._checkpoint()
        if self._has_evaluation(step):
            self._evaluate("dev")
        self._publish()

    def _collapse(self, result: StepResult) -> CollapsedError | None:
        """The error that ends this attempt, where the step shows that the policy breaks and the run should go back."""
        action = self._settings.guard
        trip = None if action == "off" else self._guard.look(result.step, result.metrics)
        if trip is None:
            return None
        assert action != "off", "nothing is looked for then"
        told = note_collapse(self._run_folder, trip, action=action)
        if action == "rewind":
            return CollapsedError(told, trip.first_bad)
        self._reporter.note(f'warning: {told}; lower optimizer.learning_rate, or set guard = "rewind"')
        self._guard = Guard()  # told once
        return None

    def _autoscale(self, *, wait_share: float, num_ready: int) -> None:
        """Have more or fewer actors, by who waited for whom."""
        if self._autoscaler is None:
            return
        status = self._wait(call(self._buffer, ReplayActor.status), what="the run waits for the buffer's status")
        load = StepLoad(
            wait_share=wait_share,
            fill=status.finished / status.capacity,
            num_ready=num_ready,
            num_wanted=self._fleet.num_wanted,
            capacity=status.capacity,
        )
        if (wanted := self._autoscaler.decide(load)) != load.num_wanted:
            LOG.info("%s in place of %d, since %s", counted(wanted, "rollout actor"), load.num_wanted, load)
            self._fleet.resize(wanted)

    def _has_evaluation(self, step: int) -> bool:
        """Whether the dev questions are evaluated at this step: first, last, and every so often."""
        every = self._settings.eval_every
        return step in (self._first_step, self._settings.num_steps) or (every > 0 and step % every == 0)

    def _take(self, step: int, *, rho: float | None) -> Ref[StepBatch]:
        """The step's batch, once the buffer has assigned it: a reference, since its data goes to the learner alone."""
        status: BufferStatus | None = None

        def is_assigned() -> bool:
            nonlocal status
            assigned = call(self._buffer, ReplayActor.assign, step, rho=rho, timeout_s=ASSIGN_POLL_S)
            what = f"the run waits for the buffer to assign step {step}"
            if self._wait(assigned, what=what, interruptible=True):
                return True
            before = status
            status = self._wait(call(self._buffer, ReplayActor.status), what="the run waits for the buffer's status")
            if before is not None and status.num_finished > before.num_finished:
                self._fleet.progressed()
            self._reporter.waiting(step, finished=status.finished, needed=self._settings.groups_per_step)
            return False

        self._supervisor.until(
            is_assigned,
            what=lambda: _how_far(step, status, needed=self._settings.groups_per_step),
            progress=lambda: None if status is None else status.num_finished,
            pause_s=0.0,
        )
        self._fleet.progressed()
        return call(self._buffer, ReplayActor.take, step)

    def _finished(self, under_way: _UnderWay) -> StepResult:
        """What the step came to, waited for: the learner is at its version from here on."""
        what = f"the run waits for the learner's step {under_way.step}"
        result = self._wait_for_learner(under_way.result, what=what, progress=self._learner_progress)
        self._version = WeightVersion(incarnation=self._version.incarnation, step=result.step)
        self._under_way = None
        return result

    def _tell(self, result: StepResult, under_way: _UnderWay) -> tuple[FleetReport, float]:
        """Report the step; how the actors did in it, and its seconds."""
        fleet, searches, step_s = self._fleet.report(), self._fleet.searches(), time.monotonic() - under_way.began
        waited_s = under_way.learner_wait_s
        self._reporter.step(result, learner_wait_s=waited_s, step_s=step_s, fleet=fleet, searches=searches)
        return fleet, step_s

    def _note_outcome(self, result: StepResult) -> None:
        """The step's groups are consumed from here on; a resume from its checkpoint knows so without it, too."""
        noted = call(self._buffer, ReplayActor.outcome, result.step, applied=result.applied)
        self._wait(noted, what=f"the run waits for the buffer to note step {result.step}")

    def _push(self, *, updated: bool) -> None:
        """Start the transfer of the current version to all actors; an unchanged one is only renamed."""
        self._supervisor.until_current(self._version.step - 1)
        # An actor that samples in float32 needs all bits, one in bfloat16 can do with what it uses.
        dtype: Literal["float32", "bfloat16"] = "float32" if "float32" in self._fleet.dtypes else "bfloat16"
        published = start_export(self._learner, dtype, num_buckets=self._num_buckets) if updated else None
        self._fleet.publish(self._version, published)

    def _publish(self) -> None:
        """Open admission for the current version."""
        told = call(self._buffer, ReplayActor.publish, self._version)
        self._wait(told, what=f"the run waits for the buffer to hear of {self._version}")

    def _evaluate(self, split: str) -> None:
        """Greedy episodes of a split under the current version, unless `eval.jsonl` has them.

        One that searches keep from ending is left out: the run does not depend on it.
        """
        questions = self._questions[split]
        started, step = time.monotonic(), self._version.step
        if not questions or split in self._run_folder.evaluated(step):
            return
        self._reporter.stage(f"evaluating {counted(len(questions), f'{split} question')} at step {step}")
        try:
            scores = evaluate(
                questions, version=self._version, split=split, fleet=self._fleet, supervisor=self._supervisor
            )
        except RetrieverError as error:
            self._reporter.end_stage()
            self._warn(
                f"the evaluation on {split} at step {step} is left out, a search failed in each of "
                f"{counted(MAX_ATTEMPTS, 'attempt')}: {error}"
            )
            return
        self._reporter.evaluation(scores, split=split, step=step, seconds=time.monotonic() - started)

    def _checkpoint(self) -> None:
        step = self._version.step
        self._reporter.stage(f"saving the checkpoint of step {step}")
        saved = call(self._learner, LearnerActor.save, self._run_folder.checkpoints)
        what = f"the run waits for the checkpoint of step {step}"
        self._wait_for_learner(saved, what=what, progress=self._learner_progress)
        self._saved_step = step
        self._run_folder.set_steps(step)
        committed = self._run_folder.committed_checkpoints()
        good = self._good_ones(committed)
        prune(
            self._run_folder.checkpoints,
            keep_last=self._settings.keep_checkpoints,
            needed=[self._run_folder.best_checkpoint(), *self._origin, *(committed[step] for step in good)],
        )
        # A resume goes on from one of the newest; the best one is kept for its weights.
        oldest = min([*committed][-self._settings.keep_checkpoints :] + good)
        if self._settings.guard == "rewind" and oldest > self._version.step + 1 - WINDOW:
            oldest = self._first_step  # where it would go back to, having no checkpoint from before the window
        settled = call(self._buffer, ReplayActor.settle, oldest)
        self._wait(settled, what=f"the run waits for the buffer to let go of what step {oldest} contains")
        self._reporter.end_stage()

    def _good_ones(self, committed: Mapping[int, Path]) -> list[int]:
        """Steps that the run could go back to when the policy breaks in the steps to come."""
        if self._settings.guard != "rewind":
            return []
        before = [step for step in committed if step <= self._version.step + 1 - WINDOW]
        return [step for step in committed if step >= max(before, default=0)]

    def _learner_progress(self) -> object:
        return peek(ask_progress(self._learner))

    def _wait_for_learner(self, ref: Ref[T], *, what: str, progress: Callable[[], object] | None = None) -> T:
        try:
            return self._wait(ref, what=what, progress=progress)
        except StalledError:
            self._is_learner_stuck = True
            raise

    def _wait(
        self, ref: Ref[T], *, what: str, progress: Callable[[], object] | None = None, interruptible: bool = False
    ) -> T:
        return self._supervisor.wait(ref, what=what, progress=progress, interruptible=interruptible)


def _how_far(step: int, status: BufferStatus | None, *, needed: int) -> str:
    told = f"the learner waits for the groups of step {step}"
    if status is None:
        return told
    told += (
        f": {status.finished} of {needed} are finished, {status.leased} are begun, {status.waiting} wait for an actor"
    )
    if status.num_flat:
        told += f"; {counted(status.num_flat, 'group')} with equal rewards dropped so far (replay.refill)"
    return told
