"""What every engine is set up with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rexrag.model.loading import Device


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """
    Attributes:
        max_sequences: sequences that run at once; of the embedded engine its cache slots, in which the prefixes of
            finished ones are kept, too.
        max_length: most tokens of a sequence, prompt included.
        dtype: precision of weights and cache; log-probs are float32 either way.
        inflight: what happens to running sequences at a weight change.
        num_threads: threads of the engine's passes; None leaves them as they are.
        device: where weights and cache are.
    """

    max_sequences: int
    max_length: int
    dtype: Literal["float32", "bfloat16"]
    inflight: Literal["keep", "recompute"]
    num_threads: int | None
    device: Device
