"""A run that collapses goes back to its last good checkpoint, and on at a lower learning rate.

collapse ──▶ checkpoints and lines after the good one are cut, as on a resume ──▶ the parts begin again there
                                                                                  at half the learning rate
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Final, Literal

from rexrag.errors import CollapsedError, RunFailure, counted
from rexrag.files import append_line, read_jsonl
from rexrag.learner.checkpoint import delete_rest, uncommit
from rexrag.run.guard import Trip
from rexrag.run.identity import first_step_of, origin_of
from rexrag.run.plan import TrainRequest
from rexrag.run_folder import RunFolder

LOG = logging.getLogger(__name__)

MAX_REWINDS: Final = 2
RATE_FACTOR: Final = 0.5
"""Of the learning rate, after each time that the run has gone back."""


def note_collapse(run: RunFolder, trip: Trip, *, action: Literal["warn", "rewind"]) -> str:
    """Write the evidence of a collapse; returns it in words."""
    line = {"step": trip.step, "first_bad": trip.first_bad, "action": action, "reasons": trip.reasons}
    append_line(run.guard, json.dumps(line, ensure_ascii=False))
    told = f"the policy breaks at step {trip.step}: {'; '.join(trip.reasons)}"
    LOG.warning("%s", told)
    return told


def rate_factor(run: RunFolder) -> float:
    """What the learning rate of a run is multiplied with, by how often it has gone back."""
    return float(RATE_FACTOR ** _num_rewinds(run))


def go_back(request: TrainRequest, collapse: CollapsedError) -> TrainRequest:
    """The same run from its last good checkpoint on; what came after it is cut.

    The checkpoint is the newest from before the window in which the collapse was seen.

    Raises:
        RunFailure: it has gone back too often.
    """
    run = request.run
    done = _num_rewinds(run)
    if done > MAX_REWINDS:
        raise RunFailure(
            f"{collapse}; it has gone back {counted(MAX_REWINDS, 'time')} already, so another rate will not help: look "
            f"at {run.guard} and metrics.lost.jsonl, and change the method or the data"
        ) from collapse
    committed = run.committed_checkpoints()
    good = max((step for step in committed if step < collapse.first_bad), default=first_step_of(run))
    origin = None if good in committed else origin_of(run)[0]
    broken = [folder for step, folder in sorted(committed.items(), reverse=True) if step > good]
    for folder in broken:  # first none of them counts any more, the newest first, then what is in them goes
        uncommit(folder)
    for folder in broken:
        delete_rest(folder)
    run.cut_after(good)
    run.set_steps(good)
    return replace(request, start_step=good, checkpoint=committed.get(good, origin), resumed=True)


def _num_rewinds(run: RunFolder) -> int:
    return sum(line.get("action") == "rewind" for line in read_jsonl(run.guard))
