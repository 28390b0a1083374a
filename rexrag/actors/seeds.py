"""Seeds of draws, from what is drawn and for whom: never from ids of a process or a run."""

from __future__ import annotations

import hashlib


def draw_seed(run_seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63) that depends on the run's seed and the parts alone.

    Example:
        >>> draw_seed(0, "epoch", 1) == draw_seed(0, "epoch", 1)
        True
    """
    text = "\x1f".join([str(run_seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
