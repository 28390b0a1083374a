"""A linear layer for inference whose weight lies as the matrix kernels read it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class PackedLinear:
    """[N, in] -> [N, out]: x Wᵀ + b.

    Otherwise the library packs the weight at each call, which takes longer than a product with few rows: three
    times at 4 rows of float32 (two AVX2 cores). On a GPU, and where oneDNN cannot take the precision,
    the weight stays as it is.

    Args:
        bias: [out], kept. The weight comes with `load`.
    """

    def __init__(self, dtype: torch.dtype, *, device: torch.device, bias: Tensor | None = None) -> None:
        self._packs = device.type == "cpu" and _can_pack(dtype)
        self._bias = bias
        self._weight = torch.empty(0)

    def load(self, weight: Tensor) -> None:
        """Set the weight [out, in]; it is not kept where it is packed."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packs else weight

    def weight(self) -> Tensor:
        """The weight [out, in] as it was loaded; a copy where it is packed."""
        return self._weight.to_dense() if self._packs else self._weight

    def __call__(self, inputs: Tensor) -> Tensor:
        if self._packs:
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
            return outputs
        return F.linear(inputs, self._weight, self._bias)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
