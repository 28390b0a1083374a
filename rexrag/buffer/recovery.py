"""From the log on disk back to a working buffer.

Groups of steps that the resumed run has not done, and groups that saw weights which it has not made, are `lost`: their
questions are asked again under the same attempt. Finished groups stay, unfinished ones wait for a lease.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rexrag.buffer.damage import Findings, examine, find_holes, named
from rexrag.buffer.ledger import Accounting, GroupState, Ledger, what_then
from rexrag.buffer.log import Damage, cut_torn_tail, read_head, read_log
from rexrag.buffer.log_writer import LogWriter
from rexrag.buffer.records import Begin, Drop, DropReason, Outcome, Record
from rexrag.buffer.segments import segment_number, segments
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.state import ReplayState
from rexrag.errors import RunFolderError, counted
from rexrag.types import Question

LOG = logging.getLogger(__name__)


def accounting_from_log(folder: Path) -> Accounting:
    """The accounting of a run from its log alone, which is only read.

    Raises:
        RunFolderError: a log of another version.
    """
    return _fold(read_log(folder))[0].accounting()


def books_from_log(folder: Path, *, first_step: int = 0) -> tuple[Accounting, tuple[str, ...]]:
    """The accounting, and a sentence for each damage that the log has or had to be mended for.

    Args:
        first_step: the step that the run began after.

    Raises:
        RunFolderError: a log of another version.
    """
    ledger, damages = _fold(read_log(folder))
    holes = [hole for hole in find_holes(ledger, first_step=first_step, resume_step=None) if hole.steps]
    findings = Findings(damages=[damage for damage in damages if not damage.torn], holes=holes)
    return ledger.accounting(), findings.sentences()


def check_questions(folder: Path, questions: Sequence[Question]) -> None:
    """Refuse questions that are not those of the log in `folder`, if there is one; only a segment's head is read.

    Raises:
        RunFolderError: other questions, or a log of another version.
    """
    for segment in reversed(segments(folder)):
        ledger, _ = _fold(read_head(segment))
        if ledger.begin is not None:
            _compare_questions(ledger.begin, folder=folder, questions=questions)
            return


def open_buffer(
    settings: ReplaySettings, *, resume_step: int | None, clock: Callable[[], float], is_new: bool = False
) -> tuple[ReplayState, LogWriter]:
    """A buffer over `settings.folder` and its log, in a new incarnation that is durable when this returns.

    Args:
        resume_step: the last learner step whose result is kept; what was assigned or consumed after it is lost.
            None: step 0 of a new run.
        is_new: a new run, whose folder must hold no log.

    Raises:
        RunFolderError: a log where none may be, of another version, or of other questions.
        LogWriteError: the new incarnation cannot be written.
    """
    ledger, damages = _fold(read_log(settings.folder))
    step = resume_step or 0
    if (is_new or resume_step is None) and ledger.groups:
        raise RunFolderError(
            f"{settings.folder} holds the replay log of a run already: resume that run, or choose a new run folder"
        )
    if ledger.begin is not None:
        _compare_questions(ledger.begin, folder=settings.folder, questions=settings.questions)
    for damage in damages:
        if damage.torn:
            cut_torn_tail(damage)
    findings = examine(
        ledger,
        damages,
        first_step=settings.first_step,
        resume_step=step,
        max_attempts=settings.max_attempts,
    )
    told = (*_gone(ledger, first_step=settings.first_step, resume_step=step), *findings.sentences())
    LOG.info("the replay log in %s is gone on with after step %d", settings.folder, step)
    for sentence in told:
        LOG.warning("%s", sentence)
    writer = LogWriter(settings.folder, segment_bytes=settings.segment_bytes)
    if ledger.begin is not None:
        writer.write([ledger.snapshot()])
    records = begin_records(
        ledger,
        settings,
        incarnation=str(writer.first_segment),
        resume_step=step,
        findings=findings,
    )
    writer.write(records)
    writer.sync()
    for record in records:
        ledger.apply(record)
    for group in ledger.in_state(GroupState.FINISHED).values():
        assert group.payload is not None
        group.payload = bytes(group.payload)  # the log need not stay mapped
    return ReplayState(settings, ledger=ledger, journal=writer, clock=clock, damages=told), writer


def _gone(ledger: Ledger, *, first_step: int, resume_step: int) -> Iterator[str]:
    """What the log as a whole does not know, in sentences for the user."""
    if resume_step > first_step and ledger.begin is None:
        yield "the replay log of this run is missing: which groups were trained on is not known"
    if resume_step < ledger.settled_step:
        yield (
            "the replay log was cut after the checkpoint that the run goes on from: "
            f"the questions of {named(range(resume_step + 1, ledger.settled_step + 1))} "
            "are not asked again in their epoch"
        )


def begin_records(
    ledger: Ledger, settings: ReplaySettings, *, incarnation: str, resume_step: int, findings: Findings
) -> list[Record]:
    """What a new incarnation writes before anything else: its own name, and what became of the groups at hand."""
    begin = Begin(
        incarnation=incarnation,
        resume_step=resume_step,
        num_questions=len(settings.questions),
        questions_hash=_hash_questions(settings.questions),
    )
    drops: dict[str, Drop] = {}
    for drop in [*findings.drops, *_lost_drops(ledger, resume_step)]:
        drops.setdefault(drop.group_id, drop)
    return [begin, *_late_outcomes(ledger, resume_step), *drops.values()]


def _fold(items: Iterable[Record | Damage]) -> tuple[Ledger, list[Damage]]:
    """What the records come to, and the damage between them; of segments that nobody needs any more there is none."""
    ledger, damages = Ledger(), []
    for item in items:
        if isinstance(item, Damage):
            damages.append(item)
        else:
            ledger.apply(item)
    return ledger, [damage for damage in damages if segment_number(damage.segment) >= ledger.first_segment]


def _compare_questions(begin: Begin, *, folder: Path, questions: Sequence[Question]) -> None:
    if begin.questions_hash != _hash_questions(questions):
        raise RunFolderError(
            f"the replay log in {folder} is of {counted(begin.num_questions, 'other question')} than the "
            f"{len(questions)} given: a resume needs the same data.train"
        )


def _late_outcomes(ledger: Ledger, resume_step: int) -> list[Outcome]:
    """Steps that the checkpoint contains were consumed, though the crash came before their outcome was written."""
    incarnation = ledger.begin.incarnation if ledger.begin is not None else ""
    steps: dict[int, list[str]] = {}
    for group in ledger.in_order(GroupState.ASSIGNED):
        if group.step is not None and group.step <= resume_step:
            steps.setdefault(group.step, []).append(group.group_id)
    return [
        Outcome(incarnation=incarnation, step=step, groups=tuple(groups), applied=True)
        for step, groups in sorted(steps.items())
    ]


def _lost_drops(ledger: Ledger, resume_step: int) -> Iterator[Drop]:
    for group in ledger.in_order(GroupState.CONSUMED, GroupState.ASSIGNED, GroupState.FINISHED):
        newest = group.max_version if group.state is GroupState.FINISHED else group.step
        if newest is not None and newest > resume_step:
            yield Drop(group_id=group.group_id, reason=DropReason.LOST, then=what_then(group, DropReason.LOST))


def _hash_questions(questions: Sequence[Question]) -> str:
    keys = "\n".join(sorted(question.key for question in questions))
    return hashlib.sha256(keys.encode()).hexdigest()
