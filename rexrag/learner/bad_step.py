"""What is left behind when training meets non-finite values."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from rexrag.arrow import GROUP_SCHEMA, batch_of
from rexrag.types import StepBatch


def save_evidence(folder: Path, *, batch: StepBatch, loss: float, grad_norm: float | None) -> Path:
    """Write a step's groups as one Arrow IPC stream, with what happened in the schema's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bad-step-{batch.step:06d}.arrow"
    what = {"step": batch.step, "incarnation": batch.incarnation, "loss": str(loss), "grad_norm": str(grad_norm)}
    schema = GROUP_SCHEMA.with_metadata(
        {**(GROUP_SCHEMA.metadata or {}), b"rexrag.evidence": json.dumps(what).encode()}
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for group in batch.groups:
            writer.write_batch(batch_of(memoryview(group)).replace_schema_metadata(schema.metadata))
    return path
