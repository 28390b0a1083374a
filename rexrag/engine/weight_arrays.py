"""Weights on their way into an engine: arrays by the names of the transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.model.weight_proof import Weights


def check_arrays(weights: Weights, *, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse arrays that are not those of the model.

    Args:
        sizes: shape of each parameter of the model.

    Raises:
        ValueError: a name is missing or unknown, or an array has another shape or type.
    """
    if missing := sizes.keys() - weights.keys():
        raise ValueError(f"{len(missing)} of {len(sizes)} weights are missing, such as {min(missing)}")
    if unknown := weights.keys() - sizes.keys():
        raise ValueError(f"{len(unknown)} weights are unknown, such as {min(unknown)}")
    for name, array in weights.items():
        if array.shape != sizes[name]:
            raise ValueError(f"weight {name} has shape {array.shape}, the model has {sizes[name]}")
        if array.dtype not in (np.float32, np.uint16):
            raise ValueError(f"weight {name} is {array.dtype}, expected float32, or uint16 with the bits of bfloat16")


def as_tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """A view of a float32 array, or of one of uint16 that hold the bits of bfloat16: to be read, never written.

    Arrays from Ray's object store and mapped files are read-only, which no tensor can be: torch warns of it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        viewed = torch.from_numpy(array)
    return viewed if array.dtype == np.float32 else viewed.view(torch.bfloat16)
