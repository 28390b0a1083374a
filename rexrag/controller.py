"""The main loop: wires the parts, supervises them, ends a run. The only module that knows all others.

    RolloutActor x N ──append──▶ ReplayActor ──take(step)──▶ LearnerActor ──export──▶ RolloutActor x N
          ▲                          │ lease                                              │
          └──────────────────────────┘◀──────────────── publish(version) ────────────────┘

What each loop waits for, and what unblocks it:
    rollout actor   a lease: admission (bounded staleness), opened by `publish`; weights, pushed after each step
    take            groups_per_step finished groups, and no older group left behind; unblocked by `append`
    step            the learner's optimizer step; nothing else runs in the learner
    evaluate        greedy episodes under the version just pushed, beside the rollouts of the next step
Every wait looks after the parts meanwhile (`Supervisor`): a dead rollout actor is replaced, a dead buffer or
learner ends the run with its cause, and a stop signal is heard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray import ObjectRef

import rexrag.metrics as keys
from rexrag.board import Board
from rexrag.buffer.status import BufferStatus
from rexrag.errors import PartDiedError, RunFailure
from rexrag.evaluate import summarize
from rexrag.fleet import Fleet, Handle
from rexrag.learner.checkpoint import prune
from rexrag.progress import Progress
from rexrag.run_folder import RunFolder
from rexrag.samples import pick_samples
from rexrag.supervisor import Supervisor
from rexrag.types import EpisodeScore, Question, StepBatch, StepResult, WeightVersion
from rexrag.watch import Watch

LOG = logging.getLogger(__name__)

PART_TIMEOUT_S = 600.0
"""Bound of what no part should ever need so long for: starting, saving, exporting, counting."""
TAKE_POLL_S = 2.0
MAX_EVAL_ATTEMPTS = 3


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Of the main loop. `stall_timeout_s` bounds a learner step, a wait for groups without progress, an evaluation."""

    num_steps: int
    checkpoint_every: int
    eval_every: int
    stall_timeout_s: float
    keep_checkpoints: int
    groups_per_step: int
    transfer_dtype: Literal["float32", "bfloat16"]


class Controller:
    """Takes groups, steps the learner, publishes weights, evaluates and checkpoints, until the last step.

    Life: `run` once; `save` after `Interrupted`.

    Args:
        first: the version of the weights that learner and actors were built with.
        dev, test: questions of `data.dev` and `data.eval`.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        run_folder: RunFolder,
        first: WeightVersion,
        buffer: Handle,
        learner: Handle,
        fleet: Fleet,
        supervisor: Supervisor,
        board: Board,
        progress: Progress,
        dev: Sequence[Question],
        test: Sequence[Question],
    ) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._version = first
        self._buffer = buffer
        self._learner = learner
        self._fleet = fleet
        self._supervisor = supervisor
        self._board = board
        self._progress = progress
        self._questions = {"dev": dev, "test": test}
        self._saved_step = first.step
        self._sampled = (time.monotonic(), 0)
        self._showed_rescue = False
        self._watch = Watch()

    def run(self) -> None:
        """All steps that are left, with the evaluations before, between and after.

        Raises:
            RunFailure: a part died or stalled.
            Interrupted: a stop signal came; `save` keeps what was finished.
        """
        first = self._version.step
        for ref in self._fleet.ready():
            self._wait(ref, what="a rollout actor starts", interruptible=True)
        self._fleet.run()
        if first == 0:
            self._evaluate("test")
        if self._has_evaluation(first):
            self._evaluate("dev")
        self._progress.training(done=first, total=self._settings.num_steps)
        self._publish()
        while self._version.step < self._settings.num_steps:
            self._step(self._version.step + 1)
        self._evaluate("test")

    def save(self) -> None:
        """A checkpoint of the last finished step, unless there is one."""
        if self._saved_step != self._version.step:
            self._checkpoint()

    def _step(self, step: int) -> None:
        started = time.monotonic()
        rho = self._wait(self._learner.rho.remote(), what="the learner tells ρ")
        batch_ref, batch = self._take(step, rho=rho)
        waited_s = time.monotonic() - started
        # From here until the outcome is noted nothing is interrupted: the step counts, or it does not.
        result: StepResult = self._supervisor.wait(
            self._learner.step.remote(batch_ref),
            what=f"the learner's step {step}",
            timeout_s=self._settings.stall_timeout_s,
            interruptible=False,
        )
        self._wait(self._buffer.outcome.remote(step, applied=result.applied), what=f"the buffer notes step {step}")
        self._version = WeightVersion(incarnation=self._version.incarnation, step=step)
        self._push(updated=result.updated)
        self._record(result, batch=batch, waited_s=waited_s, step_s=time.monotonic() - started)
        if step % self._settings.checkpoint_every == 0 or step == self._settings.num_steps:
            self._checkpoint()
        if self._has_evaluation(step):
            self._evaluate("dev")
        self._publish()

    def _has_evaluation(self, step: int) -> bool:
        """Whether the dev questions are evaluated at this step: first, last, and every so often."""
        every = self._settings.eval_every
        return step in (0, self._settings.num_steps) or (every > 0 and step % every == 0)

    def _take(self, step: int, *, rho: float) -> tuple[ObjectRef[Any], StepBatch]:
        """The step's batch, as a reference for the learner and as a value for samples."""
        finished, deadline = -1, 0.0
        while True:
            ref = self._buffer.take.remote(step, rho=rho, timeout_s=TAKE_POLL_S)
            batch: StepBatch | None = self._wait(ref, what=f"the buffer gives step {step}", interruptible=True)
            if batch is not None:
                self._fleet.progressed()
                return ref, batch
            status: BufferStatus = self._wait(self._buffer.status.remote(), what="the buffer's status")
            self._progress.waiting(step, finished=status.finished, needed=self._settings.groups_per_step)
            if status.finished != finished:
                finished, deadline = status.finished, time.monotonic() + self._settings.stall_timeout_s
            if time.monotonic() > deadline:
                raise RunFailure(
                    f"the learner waits for step {step}, and no group has finished for "
                    f"{self._settings.stall_timeout_s:.0f} s; the buffer holds: {status}"
                )

    def _push(self, *, updated: bool) -> None:
        """Start the transfer of the current version to all actors; an unchanged one is only renamed."""
        for ref in self._fleet.pending_updates():
            self._wait(ref, what="an actor confirms the weights before these", interruptible=False)
        weights = self._learner.export.remote(self._settings.transfer_dtype) if updated else None
        self._fleet.publish(self._version, weights)

    def _publish(self) -> None:
        """Open admission for the current version."""
        self._wait(self._buffer.publish.remote(self._version), what=f"the buffer hears of {self._version}")

    def _evaluate(self, split: str) -> None:
        """Greedy episodes of a split under the current version: a line of `eval.jsonl`, unless it has one.

        Where an actor dies meanwhile, the evaluation begins again on the actors that there are then.
        """
        questions = self._questions[split]
        started, step = time.monotonic(), self._version.step
        if not questions or split in self._run_folder.evaluated(step):
            return
        self._progress.stage(f"evaluating {len(questions)} {split} questions at step {step}")
        for attempt in range(MAX_EVAL_ATTEMPTS):
            try:
                scores = self._scores(split, questions)
                break
            except PartDiedError:
                if attempt + 1 == MAX_EVAL_ATTEMPTS:
                    raise
                LOG.warning("an actor died during the evaluation at step %d, it begins again", step)
        line = summarize(scores).to_line(split=split, step=step, version=step, seconds=time.monotonic() - started)
        self._board.evaluation(line)
        self._progress.evaluation(line)

    def _scores(self, split: str, questions: Sequence[Question]) -> list[EpisodeScore]:
        self._supervisor.look()
        for ref in self._fleet.pending_updates():
            self._wait(ref, what=f"an actor takes {self._version}", interruptible=True)
        shares: list[list[EpisodeScore]] = [
            self._supervisor.wait(ref, what=f"evaluation on {split}", timeout_s=self._settings.stall_timeout_s)
            for ref in self._fleet.evaluate(questions, version=self._version)
        ]
        return [score for share in shares for score in share]

    def _checkpoint(self) -> None:
        step = self._version.step
        self._progress.stage(f"saving the checkpoint of step {step}")
        self._wait(self._learner.save.remote(self._run_folder.checkpoints, {}), what=f"the checkpoint of step {step}")
        self._saved_step = step
        self._run_folder.set_steps(step)
        prune(
            self._run_folder.checkpoints,
            keep_last=self._settings.keep_checkpoints,
            best=self._run_folder.best_checkpoint(),
        )

    def _record(self, result: StepResult, *, batch: StepBatch, waited_s: float, step_s: float) -> None:
        """One line of `metrics.jsonl`, TensorBoard's scalars, samples, and what the terminal shows."""
        metrics = {
            **result.metrics,
            keys.STEP: float(result.step),
            keys.VERSION: float(result.step),
            keys.TIME_LEARNER_WAIT: waited_s,
            keys.TIME_STEP: step_s,
            keys.ROLLOUT_TOKENS_PER_S: self._tokens_per_s(),
        }
        flags, warnings = self._watch.look(metrics)
        metrics |= flags
        self._board.step(result.step, metrics=metrics, histograms=result.histograms)
        samples = pick_samples(batch)
        for sample in samples:
            self._board.sample(result.step, tag=sample.tag, text=sample.text, fields=sample.fields)
        if samples[-1].rescued and not self._showed_rescue:
            self._showed_rescue = True
            failed, probe = samples
            traces = f"--- a rollout of it:\n{failed.text}\n--- the probe:\n{probe.text}"
            self._progress.note(f"the first dead end that a probe leads out of\n{traces}")
        self._progress.step(result.step, metrics=metrics)
        for warning in warnings:
            LOG.warning("step %d: %s: %s", result.step, warning.key, warning.text)
            self._progress.note(f"  {warning.key}: {warning.text}")

    def _tokens_per_s(self) -> float | None:
        """Sampled tokens of all actors per second since the last call; None right after an actor was replaced."""
        now, sampled = time.monotonic(), sum(stats.sampled_tokens for stats in self._fleet.stats())
        before, self._sampled = self._sampled, (now, sampled)
        return (sampled - before[1]) / (now - before[0]) if sampled >= before[1] else None

    def _wait(self, ref: ObjectRef[Any], *, what: str, interruptible: bool = False) -> Any:  # noqa: ANN401
        return self._supervisor.wait(ref, what=what, timeout_s=PART_TIMEOUT_S, interruptible=interruptible)
