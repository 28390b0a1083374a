"""Groups between processes: one record batch as bytes."""

from __future__ import annotations

import io

import pyarrow as pa


def batch_to_ipc(batch: pa.RecordBatch) -> bytes:
    """One record batch as an Arrow IPC stream."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def batch_from_ipc(data: bytes | pa.Buffer) -> pa.RecordBatch:
    """The one record batch of an Arrow IPC stream, without a copy."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()
