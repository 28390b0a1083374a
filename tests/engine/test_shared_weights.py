"""Weights for the processes of one engine."""

from __future__ import annotations

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
