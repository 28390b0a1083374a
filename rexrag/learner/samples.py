"""Traces worth a look: of each step a rescued group where there is one, else its first target."""

from __future__ import annotations

from collections.abc import Sequence

from rexrag.types import Kind, Sample, Trajectory, TrajectoryGroup


def pick_samples(groups: Sequence[TrajectoryGroup]) -> tuple[Sample, ...]:
    """A probe that rescued its group, after its failed parent; without one the first target of the step."""
    for group in groups:
        targets = [row for row in group.trajectories if row.kind is Kind.TARGET]
        rescuer = next((row for row in group.trajectories if row.kind is Kind.PROBE and row.correct), None)
        if rescuer is not None and not any(row.correct for row in targets):
            assert rescuer.parent is not None, "a probe has a parent"
            return _sample(group, group.trajectories[rescuer.parent]), _sample(group, rescuer, rescued=True)
    return (_sample(groups[0], groups[0].trajectories[0]),)


def _sample(group: TrajectoryGroup, row: Trajectory, *, rescued: bool = False) -> Sample:
    fields = {
        "question_id": group.question_id,
        "group_id": group.group_id,
        "kind": row.kind.value,
        "rescued": rescued,
        "hint_id": row.hint_id,
        "branch_point": row.branch_point,
        "end_reason": row.end_reason.value,
        "em": row.em,
        "num_searches": row.num_searches,
    }
    return Sample(tag=row.kind.value, text=row.text or "", rescued=rescued, fields=fields)
