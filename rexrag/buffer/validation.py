"""What an appended group must be. It comes from another process, so nothing in it is taken for granted."""

from __future__ import annotations

from rexrag.arrow import group_from_ipc
from rexrag.types import TrajectoryGroup


def parse_group(ipc: bytes, *, group_id: str, question: str, newest_version: int) -> TrajectoryGroup:
    """The group in an Arrow IPC stream.

    Args:
        group_id, question: which group it must be, and of which question (`Question.key`).
        newest_version: the newest weights that any token can come from.

    Raises:
        ValueError: it is damaged, of another schema, breaks an invariant, or is not that group.
    """
    try:
        group = group_from_ipc(ipc)
    except ValueError as error:
        raise ValueError(f"group {group_id} is not a valid group: {error}") from error
    if (group.group_id, group.question_id) != (group_id, question):
        raise ValueError(
            f"group {group.group_id} of question {group.question_id} was appended as group {group_id} of {question}"
        )
    if group.max_version is not None and group.max_version > newest_version:
        raise ValueError(
            f"group {group_id} has tokens of version {group.max_version}, the newest weights are of {newest_version}"
        )
    return group
