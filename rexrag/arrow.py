"""How a group of trajectories lies in Arrow: one row per trajectory, one record batch per group.

    TrajectoryGroup ──group_to_ipc──▶ bytes of an IPC stream ──group_from_ipc──▶ TrajectoryGroup

Between the two only bytes travel: through the replay log, Ray's object store, and a step's batch.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rexrag.types import EndReason, Kind, Trajectory, TrajectoryGroup

SCHEMA_VERSION: Final = "3"

GROUP_SCHEMA: Final = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("hops", pa.int32()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("parent", pa.int32()),
        pa.field("branch_point", pa.int32()),
        pa.field("hint_id", pa.int32()),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("em", pa.float64(), nullable=False),
        pa.field("f1", pa.float64(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("end_reason", pa.string(), nullable=False),
        pa.field("num_searches", pa.int32(), nullable=False),
        pa.field("num_malformed", pa.int32(), nullable=False),
        pa.field("num_refused", pa.int32(), nullable=False),
        pa.field("gold_retrieved", pa.bool_()),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("origin", pa.list_(pa.uint8()), nullable=False),
        pa.field("behavior_logprob", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_version", pa.list_(pa.int32()), nullable=False),
        pa.field("action_starts", pa.list_(pa.int32()), nullable=False),
        pa.field("alternative_logprob", pa.list_(pa.float32())),
        pa.field("alternative_branch", pa.int32()),
        pa.field("alternative_hint_id", pa.int32()),
        pa.field("score_version", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("generate_s", pa.float64(), nullable=False),
        pa.field("search_s", pa.float64(), nullable=False),
    ],
    metadata={"rexrag.schema_version": SCHEMA_VERSION},
)
"""Columns are the fields of `TrajectoryGroup` and `Trajectory`; nothing that follows from others is stored. The list
columns' values and offsets are the packed layout (`cu_seqlens`) that the learner reads."""

_OF_GROUP: Final = ("group_id", "question_id", "data_source", "hops")
_ENUMS: Final = {"kind": Kind, "end_reason": EndReason}
_LISTS: Final = {
    "token_ids": np.int32,
    "origin": np.uint8,
    "behavior_logprob": np.float32,
    "policy_version": np.int32,
    "action_starts": np.int32,
    "alternative_logprob": np.float32,
}
_PLAIN: Final = tuple(name for name in GROUP_SCHEMA.names if name not in {*_OF_GROUP, *_ENUMS, *_LISTS})


def group_to_ipc(group: TrajectoryGroup) -> bytes:
    """The group as an Arrow IPC stream with one record batch of `GROUP_SCHEMA`."""
    batch = pa.record_batch([_column(group, name) for name in GROUP_SCHEMA.names], schema=GROUP_SCHEMA)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def group_from_ipc(data: bytes | memoryview | pa.Buffer) -> TrajectoryGroup:
    """The inverse of `group_to_ipc`; per-token arrays are read-only views of `data`.

    Raises:
        ValueError: no IPC stream, another schema version, another schema, rows of more than one group, or rows that
            break an invariant.
    """
    batch = batch_of(data)
    version = (batch.schema.metadata or {}).get(b"rexrag.schema_version", b"none").decode()
    if version != SCHEMA_VERSION:
        raise ValueError(f"group schema version {version} is unknown, this build reads version {SCHEMA_VERSION}")
    if not batch.schema.equals(GROUP_SCHEMA):
        raise ValueError("the record batch does not have GROUP_SCHEMA")
    if batch.num_rows == 0:
        raise ValueError("the record batch has no row, a group has at least one trajectory")
    try:
        batch.validate(full=True)
        return _group_of(batch)
    except (TypeError, LookupError, pa.ArrowException) as error:
        raise ValueError(f"the record batch is damaged: {error}") from error


def batch_of(data: bytes | memoryview | pa.Buffer) -> pa.RecordBatch:
    """The one record batch of an Arrow IPC stream, without a copy.

    Raises:
        ValueError: the bytes are no such stream.
    """
    try:
        with pa.ipc.open_stream(data) as reader:
            return reader.read_next_batch()
    except (OSError, StopIteration, pa.ArrowException) as error:
        raise ValueError(f"these are not the bytes of an Arrow IPC stream with a record batch: {error!r}") from error


def _group_of(batch: pa.RecordBatch) -> TrajectoryGroup:
    for name in _OF_GROUP:
        if len(batch.column(name).unique()) != 1:
            raise ValueError(f"the record batch has rows with more than one {name}")
    plain = {name: batch.column(name).to_pylist() for name in (*_PLAIN, *_ENUMS)}
    lists = {name: _split_lists(batch.column(name)) for name in _LISTS}
    rows = []
    for i in range(batch.num_rows):
        values: dict[str, Any] = {name: column[i] for name, column in (*plain.items(), *lists.items())}
        values |= {name: enum(values[name]) for name, enum in _ENUMS.items()}
        rows.append(Trajectory(**values))
    return TrajectoryGroup(trajectories=tuple(rows), **{name: batch.column(name)[0].as_py() for name in _OF_GROUP})


def _column(group: TrajectoryGroup, name: str) -> pa.Array:
    rows, type_ = group.trajectories, GROUP_SCHEMA.field(name).type
    if name in _OF_GROUP:
        return pa.array([getattr(group, name)] * len(rows), type_)
    values = [getattr(row, name) for row in rows]
    if name in _LISTS:
        return _join_lists(values, name)
    return pa.array([value.value for value in values] if name in _ENUMS else values, type_)


def _join_lists(arrays: Sequence[npt.NDArray[np.generic] | None], name: str) -> pa.ListArray:
    """A list column: an array per row, null where a row has none."""
    dtype = _LISTS[name]
    present = [np.empty(0, dtype) if array is None else array.astype(dtype, copy=False) for array in arrays]
    offsets = pa.array(np.cumsum([0, *map(len, present)]), pa.int32())
    missing = pa.array([array is None for array in arrays])
    mask = missing if GROUP_SCHEMA.field(name).nullable else None
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(present)), mask=mask)


def _split_lists(column: pa.ListArray) -> list[npt.NDArray[np.generic] | None]:
    """The inverse of `_join_lists`: views of the column."""
    values = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    present = column.is_valid().to_pylist()
    return [
        values[a:b] if is_there else None for is_there, (a, b) in zip(present, itertools.pairwise(offsets), strict=True)
    ]
