"""Static key-value cache: one slot per sequence, contiguous in positions."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_LENGTH_STEP: Final = 32
"""Lengths of bfloat16 products are multiples of it: each further size keeps memory in the matrix library."""

_RUN_COST: Final = 128
"""What one more attention call costs, in cache positions that could be read meanwhile (measured on x86 CPUs)."""


class KvCache:
    """Keys and values of all slots, per layer [slots, kv heads, positions, head_dim].

    On a CPU memory is zero pages until it is written: positions that no sequence reaches cost nothing.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._max_length = max_length
        self._dtype = dtype
        shape = (num_slots, num_kv_heads, max_length, head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]

    def reading_length(self, length: int) -> int:
        """How many positions to read where `length` of them count.

        Products of bfloat16 are compiled for each size and copy operands that are not in one piece, as slots cut
        short are: sizes are rounded up, and from half a slot on all of it is read (faster on x86 with AVX512-BF16).
        Those of float32 are neither.
        """
        if self._dtype is torch.float32:
            return length
        if 2 * length >= self._max_length:
            return self._max_length
        return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self._max_length)

    def write(self, layer: int, *, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store N tokens: slots and positions [N], keys and values [N, kv heads, head_dim]."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def copy(self, *, source: int, target: int, length: int) -> None:
        """Make the first positions of a slot those of another one."""
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # torch.zeros writes to all of it, and numpy asks for pages so large that the end of each slot is in one, too.
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def attention_runs(slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut rows into runs of neighbouring slots that one attention call serves without copying keys and values.

    Each call reads (last slot - first slot + 1) x (longest length) positions: slots in between that are idle, and
    the rest of shorter rows, are read for nothing. A run ends where going on would cost more than a call of its own.

    Args:
        slots: ascending. lengths: positions that each row attends to.

    Returns:
        (first slot, last slot + 1, longest length) of each run.
    """
    runs = [(slots[0], slots[0] + 1, lengths[0])]
    for slot, length in zip(slots[1:], lengths[1:], strict=True):
        first, end, longest = runs[-1]
        merged = (slot + 1 - first) * max(longest, length)
        if merged <= (end - first) * longest + length + _RUN_COST:
            runs[-1] = (first, slot + 1, max(longest, length))
        else:
            runs.append((slot, slot + 1, length))
    return runs
