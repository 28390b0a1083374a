"""An index folder, opened as what its manifest says it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rexrag.retrieval.bm25 import BM25Index
from rexrag.retrieval.manifest import read_manifest
from rexrag.retrieval.packages import require_faiss
from rexrag.retrieval.protocol import BatchIndex

LOG = logging.getLogger(__name__)


def open_index(
    folder: Path, *, encoder: Path | None = None, gpu_share: float = 0.0, num_threads: int | None = None
) -> BatchIndex[Any]:
    """The index in a folder, of the kind that its manifest names, for calls that block.

    Args:
        encoder: where the encoder of a dense index is now; None: where it was.
        gpu_share: of a GPU, for the encoder of a dense index and, where there is room, its vectors; 0: on the CPU.
        num_threads: of each stage of a dense index; None leaves them as they are.

    Raises:
        RetrievalIndexError: no usable index there.
        ConfigError: a dense one, and FAISS is not installed.
        ModelError: its encoder is missing or cannot be loaded.
    """
    if read_manifest(folder).kind == "bm25":
        if gpu_share:
            LOG.warning("%s: a bm25 index uses no GPU; leave out --gpu, or set retriever.num_gpus = 0", folder)
        return BM25Index(folder)
    require_faiss()
    from rexrag.retrieval.dense import DenseIndex

    return DenseIndex(folder, encoder=encoder, gpu_share=gpu_share, num_threads=num_threads)
