"""What a damaged log leaves open, and what is done about it: what cannot be known is not trained on, and told.

A log is whole when its segments are numbered without a gap, every byte of them is a record, and each incarnation has
a batch for every step up to the one at which the next one began, or for which there is a checkpoint. The last holds for
a log that was copied while a run went on, too: it ends, in whole records, before the checkpoint that was copied after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rexrag.buffer.ledger import GroupState, Ledger, what_then
from rexrag.buffer.log import Damage
from rexrag.buffer.records import Drop, DropReason
from rexrag.errors import counted

_UNFINISHED = (GroupState.OPEN, GroupState.FINISHED)


@dataclass(frozen=True, kw_only=True)
class Hole:
    """Steps that were done, but of whose batches the log says nothing.

    `end`: the incarnation that began after them; their groups were issued before. None: none has begun yet.
    """

    steps: tuple[int, ...]
    end: str | None

    def may_have(self, group_id: str) -> bool:
        """Whether the group can have been trained on in these steps."""
        return self.end is None or _number(group_id.rpartition("-")[0]) < _number(self.end)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What reading a log brought to light. `damages` has no torn tail: that is a crash, and costs nothing."""

    damages: Sequence[Damage] = ()
    holes: Sequence[Hole] = ()
    drops: Sequence[Drop] = field(default=())

    def sentences(self) -> tuple[str, ...]:
        """For the user, one for each finding; none where the log is whole."""
        missing = [damage for damage in self.damages if damage.is_missing]
        told = [str(damage) for damage in self.damages if len(missing) < 2 or not damage.is_missing]
        if len(missing) > 1:
            names = _listed([damage.segment.name for damage in missing])
            told.insert(0, f"{counted(len(missing), 'segment')} of {missing[0].segment.parent} are missing: {names}")
        told += [f"the replay log does not say which groups {named(hole.steps)} trained on" for hole in self.holes]
        if self.drops:
            told.append(
                f"{counted(len(self.drops), 'group')} of the replay log that cannot be vouched for: dropped as "
                "corrupt, questions asked again"
            )
        return tuple(told)


def examine(
    ledger: Ledger, damages: Sequence[Damage], *, first_step: int, resume_step: int, max_attempts: int
) -> Findings:
    """What is open in a log that was read into `ledger`, and the drops that close it.

    Args:
        first_step: the step that the run began after.
        resume_step: the step of the checkpoint that is gone on from.
    """
    damages = [damage for damage in damages if not damage.torn]
    holes = [hole for hole in find_holes(ledger, first_step=first_step, resume_step=resume_step) if hole.steps]
    drops: dict[str, Drop] = {}
    for group_id in [*ledger.superseded, *sorted(ledger.missing)]:
        known = ledger.groups.get(group_id)
        if known is None or known.state is not GroupState.DROPPED:
            drops[group_id] = Drop(
                group_id=group_id, reason=DropReason.CORRUPT, then=what_then(None, DropReason.CORRUPT)
            )
    broken = {damage.group_id for damage in damages}
    for group in ledger.in_order(*_UNFINISHED):
        doubtful = any(hole.may_have(group.group_id) for hole in holes)
        is_lost = group.payload is None if group.state is GroupState.FINISHED else group.group_id in broken
        if doubtful or is_lost:
            then = what_then(group, DropReason.CORRUPT, max_attempts=max_attempts)
            drops.setdefault(group.group_id, Drop(group_id=group.group_id, reason=DropReason.CORRUPT, then=then))
    return Findings(damages=damages, holes=holes, drops=tuple(drops.values()))


def find_holes(ledger: Ledger, *, first_step: int, resume_step: int | None) -> Iterator[Hole]:
    """For each incarnation the steps that it must have done, and has no batch of; without a name none is missing.

    What is settled was known when it was settled.

    Args:
        first_step: the step that the run began after, that of another run's checkpoint or 0.
        resume_step: up to which step the last incarnation must know; None: whatever it knows is all.
    """
    begins = ledger.begins
    if not begins:
        return
    if begins[0].incarnation != "1":  # the log's first segments are gone
        first = max(first_step, ledger.settled_step)
        yield Hole(steps=tuple(range(first + 1, begins[0].resume_step + 1)), end=begins[0].incarnation)
    ends = [begin.resume_step for begin in begins[1:]]
    for begin, end, following in zip(begins, [*ends, resume_step], [*begins[1:], None], strict=True):
        if end is not None:
            known: Collection[int] = ledger.known_steps.get(begin.incarnation, ())
            first = max(begin.resume_step, ledger.settled_step)
            steps = tuple(step for step in range(first + 1, end + 1) if step not in known)
            yield Hole(steps=steps, end=None if following is None else following.incarnation)


def named(steps: Sequence[int]) -> str:
    """Steps in words."""
    return f"{'step' if len(steps) == 1 else 'steps'} {_listed([str(step) for step in steps])}"


def _number(incarnation: str) -> int:
    return int(incarnation) if incarnation.isdecimal() else 0


def _listed(words: Sequence[str], *, most: int = 5) -> str:
    shown = ", ".join(words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"
