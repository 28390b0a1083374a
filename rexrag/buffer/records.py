"""What the replay log says: one frozen record for each fact, as JSON header and, for some, a payload of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

from rexrag.errors import RunFolderError


class DropReason(StrEnum):
    """Why a group never reached the learner, or did so in a history that was given up (`LOST`)."""

    STALE = "stale"
    ENV_ERROR = "env_error"
    INVALID = "invalid"
    CORRUPT = "corrupt"
    LOST = "lost"
    FLAT = "flat"


class Then(StrEnum):
    """What becomes of a dropped group's question in its epoch."""

    AGAIN = "again"
    GIVEN_UP = "given_up"
    ELSEWHERE = "elsewhere"
    """Nothing to do: another group has it, or it is not known and its epoch asks for it anyway."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A new incarnation of the buffer. Steps after `resume_step` belong to it, not to those before."""

    incarnation: str
    resume_step: int
    num_questions: int
    questions_hash: str


@dataclass(frozen=True, kw_only=True)
class Issue:
    """A group exists from here on. `version`: the step of the weights published then."""

    group_id: str
    epoch: int
    question: str
    attempt: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Finish:
    """A finished group. It repeats its `Issue`, so that either record alone identifies it.

    `version` bounds the age of its tokens from below: the lease's, or that of an older token.
    """

    group_id: str
    epoch: int
    question: str
    attempt: int
    version: int
    min_version: int | None
    max_version: int | None
    payload: bytes | memoryview = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Drop:
    group_id: str
    reason: DropReason
    then: Then


@dataclass(frozen=True, kw_only=True)
class Assign:
    """The batch of a learner step, decided. `rho`: the filter's share of §8, None without a filter."""

    incarnation: str
    step: int
    groups: tuple[str, ...]
    rho: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The step is over and its groups are consumed; not `applied`: it was skipped."""

    incarnation: str
    step: int
    groups: tuple[str, ...]
    applied: bool


@dataclass(frozen=True, kw_only=True)
class Settle:
    """No resume goes on from before `step`: what was consumed up to it, or dropped, is counted and forgotten.

    `first_segment`: the log's segments before it are deleted from here on, since all their groups are settled.
    """

    step: int
    first_segment: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that the records before it come to, but for the bytes of groups: a segment's head, `Ledger.snapshot`."""

    payload: bytes | memoryview = field(repr=False)


Record: TypeAlias = Begin | Issue | Finish | Drop | Assign | Outcome | Settle | Snapshot

_TYPES: Final[dict[str, type[Record]]] = {
    "begin": Begin,
    "issue": Issue,
    "group": Finish,
    "drop": Drop,
    "assign": Assign,
    "outcome": Outcome,
    "settle": Settle,
    "snapshot": Snapshot,
}
_NAMES: Final = {cls: name for name, cls in _TYPES.items()}


def encode(record: Record) -> tuple[dict[str, object], bytes | memoryview]:
    """Header and payload of a record; the payload is empty but for `Finish` and `Snapshot`."""
    header: dict[str, object] = {"type": _NAMES[type(record)]}
    for item in dataclasses.fields(record):
        if item.name != "payload":
            header[item.name] = getattr(record, item.name)
    return header, record.payload if isinstance(record, Finish | Snapshot) else b""


def decode(header: Mapping[str, object], payload: memoryview) -> Record:
    """The inverse of `encode`.

    Raises:
        RunFolderError: a record that this build does not know (its checksum was right).
    """
    values = dict(header)
    cls = _TYPES.get(str(values.pop("type", None)))
    if cls is None:
        raise RunFolderError(f"the replay log has a record of type {header.get('type')!r}, unknown to this build")
    if cls in (Finish, Snapshot):
        values["payload"] = payload
    if isinstance(groups := values.get("groups"), list):
        values["groups"] = tuple(groups)
    try:
        if cls is Drop:
            values |= {"reason": DropReason(str(values["reason"])), "then": Then(str(values["then"]))}
        make: Callable[..., Record] = cls
        return make(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise RunFolderError(
            f"the replay log has a {header['type']!r} record that this build does not read ({error}): "
            "use the version of rexrag that wrote it"
        ) from error
