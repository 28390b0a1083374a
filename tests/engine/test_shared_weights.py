"""Weights for the processes of one engine."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rexrag.engine import shared_weights
from rexrag.engine.shared_weights import in_shared_memory

WEIGHTS: dict[str, npt.NDArray[np.generic]] = {
    "a": np.arange(7, dtype=np.float32).reshape(7, 1),
    "b": np.arange(5, dtype=np.uint16),
    "c": np.array(3.5, np.float32),
}


def test_where_shared_memory_has_no_room_a_file_of_the_temporary_folder_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, is_full = os.posix_fallocate, [True, False, True, True]

    def allocate(fd: int, offset: int, size: int) -> None:
        if is_full.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(shared_weights, "_SHARED_MEMORY", tmp_path)
    with in_shared_memory(WEIGHTS) as shared:
        assert tmp_path not in shared.path.parents
        assert all((shared.arrays()[name] == WEIGHTS[name]).all() for name in WEIGHTS)
    with pytest.raises(OSError, match="No space left"), in_shared_memory(WEIGHTS):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_room", [True, False])
def test_another_process_maps_the_same_arrays_and_they_go_when_all_have_them(
    has_room: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not has_room:
        monkeypatch.setattr(shared_weights, "_SHARED_MEMORY", tmp_path / "none")
    with in_shared_memory(WEIGHTS) as shared:
        arrays = pickle.loads(pickle.dumps(shared)).arrays()
        assert arrays.keys() == WEIGHTS.keys()
        for name, array in arrays.items():
            assert array.dtype == WEIGHTS[name].dtype
            np.testing.assert_array_equal(array, WEIGHTS[name])
            assert not array.flags.writeable
        assert (Path("/dev/shm") in shared.path.parents) == has_room
    assert not shared.path.exists()
