"""From the log on disk back to a working buffer.

Groups of steps that the resumed run has not done, and groups that saw weights which it has not made, are `lost`: their
questions are asked again under the same attempt. Finished groups stay, unfinished ones wait for a lease.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from rexrag.buffer.ledger import Accounting, Group, GroupState, Ledger
from rexrag.buffer.log import Damage, LogWriter, cut_torn_tail, read_log
from rexrag.buffer.records import Begin, Drop, DropReason, Outcome, Record
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.state import ReplayState, what_then
from rexrag.errors import RunFolderError


def accounting_from_log(folder: Path) -> Accounting:
    """The accounting of a run from its log alone, which is only read.

    Raises:
        RunFolderError: a log of another version.
    """
    return _fold(folder)[0].accounting()


def open_buffer(settings: ReplaySettings, *, resume_step: int | None, clock: Callable[[], float]) -> ReplayState:
    """A buffer over `settings.folder`, in a new incarnation that is durable when this returns.

    Args:
        resume_step: the last learner step whose result is kept; what was assigned or consumed after it is lost.
            None: a new run, whose folder must hold no log.

    Raises:
        RunFolderError: a log where none may be, of another version, or of other questions.
        LogWriteError: the new incarnation cannot be written.
    """
    ledger, damages = _fold(settings.folder)
    if resume_step is None and ledger.groups:
        raise RunFolderError(
            f"{settings.folder} holds the replay log of a run already: resume that run, or choose a new run folder"
        )
    _check_questions(ledger, settings)
    for damage in damages:
        if damage.torn:
            cut_torn_tail(damage)
    damages = [damage for damage in damages if not damage.torn]
    writer = LogWriter(settings.folder, segment_bytes=settings.segment_bytes)
    records = begin_records(
        ledger,
        settings,
        incarnation=str(writer.first_segment),
        resume_step=resume_step or 0,
        damaged=None if not damages else {damage.group_id for damage in damages if damage.group_id is not None},
    )
    writer.write(records, sync=True)
    for record in records:
        ledger.apply(record)
    for group in ledger.in_state(GroupState.FINISHED).values():
        assert group.payload is not None
        group.payload = bytes(group.payload)  # the log need not stay mapped
    return ReplayState(settings, ledger=ledger, journal=writer, clock=clock, damages=tuple(damages))


def begin_records(
    ledger: Ledger, settings: ReplaySettings, *, incarnation: str, resume_step: int, damaged: Collection[str] | None
) -> list[Record]:
    """What a new incarnation writes before anything else: its own name, and what became of the groups at hand.

    Args:
        damaged: groups whose bytes are damaged; None where the log is whole.
    """
    begin = Begin(
        incarnation=incarnation,
        resume_step=resume_step,
        num_questions=len(settings.questions),
        questions_hash=_hash_questions(settings),
    )
    drops: dict[str, Drop] = {}
    for drop in [*_damage_drops(ledger, settings, resume_step, damaged), *_lost_drops(ledger, resume_step)]:
        drops.setdefault(drop.group_id, drop)
    return [begin, *_late_outcomes(ledger, resume_step), *drops.values()]


def _fold(folder: Path) -> tuple[Ledger, list[Damage]]:
    ledger, damages = Ledger(), []
    for item in read_log(folder):
        if isinstance(item, Damage):
            damages.append(item)
        else:
            ledger.apply(item)
    return ledger, damages


def _check_questions(ledger: Ledger, settings: ReplaySettings) -> None:
    begin = ledger.begin
    if begin is not None and begin.questions_hash != _hash_questions(settings):
        raise RunFolderError(
            f"the replay log in {settings.folder} is of {begin.num_questions} other questions than the "
            f"{len(settings.questions)} given: a resume needs the same data.train"
        )


def _late_outcomes(ledger: Ledger, resume_step: int) -> list[Outcome]:
    """Steps that the checkpoint contains were consumed, though the crash came before their outcome was written."""
    incarnation = ledger.begin.incarnation if ledger.begin is not None else ""
    steps: dict[int, list[str]] = {}
    for group in _ordered(ledger, GroupState.ASSIGNED):
        if group.step is not None and group.step <= resume_step:
            steps.setdefault(group.step, []).append(group.group_id)
    return [
        Outcome(incarnation=incarnation, step=step, groups=tuple(groups), applied=True)
        for step, groups in sorted(steps.items())
    ]


def _lost_drops(ledger: Ledger, resume_step: int) -> Iterator[Drop]:
    for group in _ordered(ledger, GroupState.CONSUMED, GroupState.ASSIGNED, GroupState.FINISHED):
        newest = group.max_version if group.state is GroupState.FINISHED else group.step
        if newest is not None and newest > resume_step:
            yield Drop(group_id=group.group_id, reason=DropReason.LOST, then=what_then(group, DropReason.LOST))


def _damage_drops(
    ledger: Ledger, settings: ReplaySettings, resume_step: int, damaged: Collection[str] | None
) -> Iterator[Drop]:
    if damaged is None:
        return
    for group_id in [*ledger.superseded, *_missing_ids(ledger)]:
        if ledger.groups.get(group_id) is None or ledger.groups[group_id].state is not GroupState.DROPPED:
            yield Drop(group_id=group_id, reason=DropReason.CORRUPT, then=what_then(None, DropReason.CORRUPT))
    doubtful = {group_id for group_id in damaged if group_id in ledger.in_state(GroupState.OPEN)}
    if _has_missing_step(ledger, resume_step):
        # Which groups that step trained on is not known: none may be trained on twice.
        doubtful |= set(ledger.in_state(GroupState.FINISHED))
    for group in _ordered(ledger, GroupState.OPEN, GroupState.FINISHED):
        if group.group_id in doubtful:
            then = what_then(group, DropReason.CORRUPT, max_attempts=settings.max_attempts)
            yield Drop(group_id=group.group_id, reason=DropReason.CORRUPT, then=then)


def _missing_ids(ledger: Ledger) -> Iterator[str]:
    """Group ids that must have been issued, since later ones of their incarnation were."""
    numbers: dict[str, set[int]] = {}
    for group_id in ledger.groups:
        incarnation, _, number = group_id.rpartition("-")
        numbers.setdefault(incarnation, set()).add(int(number))
    for incarnation, known in numbers.items():
        yield from (f"{incarnation}-{number}" for number in range(max(known)) if number not in known)


def _has_missing_step(ledger: Ledger, resume_step: int) -> bool:
    first = ledger.begin.resume_step + 1 if ledger.begin is not None else 1
    known = {group.step for group in _ordered(ledger, GroupState.ASSIGNED, GroupState.CONSUMED)}
    return any(step not in known for step in range(first, resume_step + 1))


def _ordered(ledger: Ledger, *states: GroupState) -> Sequence[Group]:
    groups = [group for state in states for group in ledger.in_state(state).values()]
    return sorted(groups, key=lambda group: group.order)


def _hash_questions(settings: ReplaySettings) -> str:
    keys = "\n".join(sorted(question.key for question in settings.questions))
    return hashlib.sha256(keys.encode()).hexdigest()
