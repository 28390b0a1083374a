"""The one that tells what a run does: on the terminal, in TensorBoard and in the files of the run folder.

StepResult ──▶ alarms ──▶ board (metrics.jsonl, scalars, histograms, samples) and terminal
scores of an evaluation ──▶ figures with intervals ──▶ board (eval.jsonl, scalars) and terminal
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import rexrag.metrics as keys
from rexrag.reporting.alarms import Alarms
from rexrag.reporting.board import Board
from rexrag.reporting.evaluation import summarize
from rexrag.reporting.terminal import Progress
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import EpisodeScore, FleetReport, Sample, StepResult

LOG = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Told:
    """What was told last: the stage, the last step with its metrics, the last EM of each split."""

    stage: str = "starting"
    step: int = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)


class Reporter:
    """Tells stages, steps and evaluations, each as it happens. `told`: the last of each.

    Args:
        alarms: look at the metrics of each step.
        record: told them too.
    """

    def __init__(
        self,
        *,
        board: Board,
        progress: Progress,
        alarms: Alarms,
        record: Callable[[Mapping[str, float | None]], None] | None = None,
    ) -> None:
        self.told = Told()
        self._record = record
        self._board = board
        self._progress = progress
        self._alarms = alarms
        self._showed_rescue = False

    def stage(self, name: str) -> None:
        """Something begins that may take a while."""
        self.told.stage = name
        self._progress.stage(name)

    def end_stage(self) -> None:
        """What began is over, and the steps go on."""
        self.told.stage = "training"
        self._progress.end_stage()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._progress.note(text)

    def training(self, *, done: int, total: int) -> None:
        """The steps begin: `done` of `total` are behind."""
        self.told.stage, self.told.step = "training", done
        self._progress.training(done=done, total=total)

    def waiting(self, step: int, *, finished: int, needed: int) -> None:
        """The learner waits for the groups of a step."""
        self._progress.waiting(step, finished=finished, needed=needed)

    def step(
        self,
        result: StepResult,
        *,
        learner_wait_s: float,
        step_s: float,
        fleet: FleetReport,
        searches: RetrieverState,
    ) -> None:
        """A learner step is over: its metrics and samples, and what they warn of.

        Args:
            learner_wait_s: seconds that the learner waited for its groups.
            step_s: seconds from the step before to the end of this one.
            fleet: how the rollout actors do.
            searches: what their searches came to since the step before.
        """
        metrics = {
            **result.metrics,
            keys.STEP: float(result.step),
            keys.VERSION: float(result.step),
            keys.TIME_LEARNER_WAIT: learner_wait_s,
            keys.TIME_STEP: step_s,
            keys.ROLLOUT_TOKENS_PER_S: fleet.tokens_per_s,
            keys.ROLLOUT_ACTORS: float(fleet.num_ready),
            keys.ROLLOUT_ACTORS_WANTED: float(fleet.num_wanted),
            keys.ROLLOUT_REPLACED: float(fleet.num_replaced),
            keys.ENGINE_CANARY_KL: fleet.canary_kl,
            keys.ENGINE_SWITCH_S: fleet.switch_s,
            keys.ENGINE_PROOF_S: fleet.proof_s,
            keys.ENGINE_UNPROVEN: float(fleet.num_unproven),
            keys.SEARCH_EMPTY: float(searches.empty),
            keys.SEARCH_FAILED: float(searches.failed),
            keys.SEARCH_RETRIED: float(searches.retried),
            keys.SEARCH_OUTAGES: float(searches.outages),
            keys.SEARCH_OUTAGE_S: searches.outage_s,
        }
        flags, warnings = self._alarms.look(metrics)
        metrics |= flags
        self.told.stage, self.told.step, self.told.metrics = "training", result.step, metrics
        self._board.step(result.step, metrics=metrics, histograms=result.histograms)
        if self._record is not None:
            self._record(metrics)
        self._tell_samples(result)
        self._progress.step(result.step, metrics=metrics)
        for warning in warnings:
            LOG.warning("step %d: %s: %s", result.step, warning.key, warning.text)
            self._progress.note(f"  {warning.key}: {warning.text}")

    def evaluation(self, scores: Sequence[EpisodeScore], *, split: str, step: int, seconds: float) -> None:
        """An evaluation is over: a line of `eval.jsonl`."""
        line = summarize(scores).to_line(split=split, step=step, version=step, seconds=seconds)
        self._board.evaluation(line)
        self.told.stage = "training"
        self.told.evaluations[split] = {"step": step, "em": float(str(line["em"])), "n": float(str(line["n"]))}
        self._progress.evaluation(line)

    def _tell_samples(self, result: StepResult) -> None:
        for sample in result.samples:
            self._board.sample(result.step, sample)
        rescue = _rescue_in(result.samples)
        if rescue is not None and not self._showed_rescue:
            self._showed_rescue = True
            failed, probe = rescue
            traces = f"--- a rollout of it:\n{failed.text}\n--- the probe:\n{probe.text}"
            self._progress.note(f"the first dead end that a probe leads out of\n{traces}")


def _rescue_in(samples: Sequence[Sample]) -> tuple[Sample, Sample] | None:
    """A failed rollout and the probe that is right where it was wrong."""
    return (samples[0], samples[1]) if len(samples) == 2 and samples[1].rescued else None
