"""Weights for the processes of one engine: a file in shared memory, written once, that each of them maps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from rexrag.model.weight_proof import Weights

_SHARED_MEMORY: Final = Path("/dev/shm")
_ALIGNMENT: Final = 64


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """Where each array is in a file: name -> type, shape, first byte. Small, and pickles."""

    path: Path
    places: dict[str, tuple[str, tuple[int, ...], int]]

    def arrays(self) -> Weights:
        """The arrays, mapped and read-only: without a copy in the memory of this process."""
        raw = np.memmap(self.path, np.uint8, mode="r")
        return {
            name: np.ndarray(shape, dtype, buffer=raw, offset=offset)
            for name, (dtype, shape, offset) in self.places.items()
        }


@contextmanager
def in_shared_memory(weights: Weights) -> Iterator[SharedWeights]:
    """The weights in a file of shared memory, or of the folder for temporary files where that is too small.

    Raises:
        OSError: neither has room.
    """
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    size = 0
    for name, array in weights.items():
        places[name] = (array.dtype.str, array.shape, size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    with _file_of(size) as path:
        raw = np.memmap(path, np.uint8, mode="r+", shape=(size,))
        for name, (dtype, shape, offset) in places.items():
            np.copyto(np.ndarray(shape, dtype, buffer=raw, offset=offset), weights[name])
        del raw
        yield SharedWeights(path=path, places=places)


@contextmanager
def _file_of(size: int) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            path = stack.enter_context(_file_in(_SHARED_MEMORY, size))
        except OSError:
            path = stack.enter_context(_file_in(None, size))
        yield path


@contextmanager
def _file_in(place: Path | None, size: int) -> Iterator[Path]:
    """A file whose room is taken at once: who writes into a mapped one without room is ended by a signal.

    Args:
        place: None: the folder for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="rexrag-weights-", dir=place) as folder:
        path = Path(folder) / "weights"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        yield path
