"""How a group of trajectories lies in Arrow: one row per trajectory, one record batch per group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION: Final = "2"

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
        pa.field("num_turns", pa.int32(), nullable=False),
        pa.field("num_malformed", pa.int32(), nullable=False),
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
        pa.field("min_version", pa.int32()),
        pa.field("max_version", pa.int32()),
        pa.field("text", pa.string()),
        pa.field("timings", pa.map_(pa.string(), pa.float64()), nullable=False),
    ],
    metadata={"rexrag.schema_version": SCHEMA_VERSION},
)
"""One row per trajectory, one record batch per group. The list columns' values and offsets are the packed
layout (`cu_seqlens`) that the learner reads."""

LISTS: Final = {
    "token_ids": np.int32,
    "origin": np.uint8,
    "behavior_logprob": np.float32,
    "policy_version": np.int32,
    "action_starts": np.int32,
    "alternative_logprob": np.float32,
}


def join_lists(arrays: Sequence[npt.NDArray[np.generic] | None], name: str) -> pa.ListArray:
    """Column `name` of a group: an array per row, null where a row has none."""
    dtype = LISTS[name]
    present = [np.empty(0, dtype) if array is None else array.astype(dtype, copy=False) for array in arrays]
    offsets = pa.array(np.cumsum([0, *map(len, present)]), pa.int32())
    missing = pa.array([array is None for array in arrays])
    mask = missing if GROUP_SCHEMA.field(name).nullable else None
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(present)), mask=mask)


def split_lists(column: pa.ListArray) -> list[npt.NDArray[np.generic] | None]:
    """The inverse of `join_lists`: views of the column."""
    values = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    present = column.is_valid().to_pylist()
    return [
        values[a:b] if is_there else None for is_there, (a, b) in zip(present, itertools.pairwise(offsets), strict=True)
    ]
