"""Proof that the weights which an engine holds are those that the learner published.

A version travels with the learner's log-probs of a canary, a few fixed prompts, and with the sum of its raw bits. An
engine scores the canary after each switch and adds up the bits that it holds, where they can be read: fused, sharded
and padded layouts have the same sum. The canary speaks of what is computed, the bits of every parameter however little
it changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rexrag.types import FloatArray

Canary = tuple[tuple[int, ...], ...]
"""Token ids of its prompts."""
Precision = Literal["float32", "bfloat16"]
Weights = Mapping[str, npt.NDArray[np.generic]]
"""By the names of the transformers model: float32, or bfloat16 as the uint16 of its bits."""

LONGEST: Final = 64
NUM_SHORT: Final = 2
SHORT: Final = 16
"""Of the canary: tokens of its long prompt, number and tokens of the short ones. Each update pays for them."""
BOUND: Final[Mapping[Precision, float]] = {"float32": 1e-3, "bfloat16": 0.1}
"""Mean relative distance of log-probs up to which engine and learner compute the same. In float32 they are some 1e−6
apart, in bfloat16 some 2e−2; a head or a layer of another version is mostly beyond."""

_SIGNED: Final = {4: torch.int32, 2: torch.int16}
_UNSIGNED: Final = {4: np.uint32, 2: np.uint16}
"""By bytes of an entry; torch adds up no unsigned numbers, and numpy does it ten times as fast on a CPU."""
MODULUS: Final = 1 << 64
"""Of sums of bits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightProof:
    """What a published version is known by.

    Attributes:
        canary: N prompts.
        logprobs: N arrays, of each prompt's tokens from the second on, by the learner.
        moved: `distance` of these from the version before; inf of the first.
        bits: `bit_sum` of the arrays as they travel; None: of no use to this engine.
        dtype: in which the arrays travel.
        precision: the coarser of what learner and engine compute with: which bound holds.
    """

    canary: Canary
    logprobs: tuple[FloatArray, ...]
    moved: float
    bits: int | None
    dtype: Precision
    precision: Precision

    def seen_in(self, dtype: Precision) -> WeightProof:
        """The proof for an engine that keeps weights in `dtype`: in another one than they travel in bits differ."""
        return self if dtype == self.dtype else replace(self, bits=None, precision="bfloat16")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightUpdate:
    """All weights of a version, and their proof."""

    weights: Weights
    proof: WeightProof


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A version that an engine proved to hold.

    Attributes:
        canary_kl: k3 estimate of KL(engine ‖ learner) per token of the canary.
        is_told_apart: whether the proof would have failed with the weights of the version before.
        switch_s: from the end of a pass to new weights, in which the engine generates nothing; proof_s: to look at
            them, beside its generation.
    """

    canary_kl: float
    is_told_apart: bool
    switch_s: float
    proof_s: float


def canary_of(prompts: Sequence[Sequence[int]]) -> Canary:
    """Up to three prompts: the longest of these, cut at its front, and the ends of others. Empty without prompts."""
    if not prompts:
        return ()
    longest, *others = sorted(prompts, key=len, reverse=True)
    return tuple(
        tuple(ids) for ids in (longest[-LONGEST:], *(ids[-SHORT:] for ids in others[:NUM_SHORT])) if len(ids) > 1
    )


def bit_sum(arrays: Iterable[npt.NDArray[np.generic] | Tensor]) -> int:
    """Sum of the raw bits of all entries, each as an unsigned number of its size, modulo 2⁶⁴."""
    return sum(_bit_sum_of(array) for array in arrays) % MODULUS


def in_buckets(sizes: Mapping[str, int], *, most_bytes: int) -> list[list[str]]:
    """Names in their order, dealt so that each bucket has at most so many bytes, or is a single larger one."""
    buckets: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not buckets or size > left:
            buckets.append([])
            left = most_bytes
        buckets[-1].append(name)
        left -= size
    return buckets


def _bit_sum_of(array: npt.NDArray[np.generic] | Tensor) -> int:
    if isinstance(array, Tensor):
        words = array.detach().contiguous().view(_SIGNED[array.element_size()])
        if words.device.type != "cpu":
            # Signed words differ from unsigned ones by 2³² or 2¹⁶ for each that is negative.
            num_negative = int((words < 0).sum())
            return int(words.sum(dtype=torch.int64)) + num_negative * (1 << (8 * words.element_size()))
        array = words.numpy()
    unsigned = np.ascontiguousarray(array).view(_UNSIGNED[array.itemsize])
    return int(unsigned.sum(dtype=np.uint64))


def distance(one: Sequence[FloatArray], other: Sequence[FloatArray]) -> float:
    """Mean |difference| of the log-probs of all tokens, of each as a share of its own size, or of one nat where that is
    less; inf where one of them is not finite.

    As a share, since rounding grows with the log-prob: text that a model finds unlikely, as prompts may be to one that
    was trained on answers alone, is tenths of a nat apart in bfloat16.
    """
    first, second = np.concatenate([*one]).astype(np.float64), np.concatenate([*other]).astype(np.float64)
    difference = np.abs(first - second) / np.maximum(1.0, np.abs(second))
    return float(difference.mean()) if np.isfinite(difference).all() else float("inf")


def canary_kl(engine: Sequence[FloatArray], learner: Sequence[FloatArray]) -> float:
    """Mean over all tokens of r − 1 − log r with r = learner/engine."""
    log_ratio = np.concatenate([*learner]).astype(np.float64) - np.concatenate([*engine])
    return float((np.expm1(log_ratio) - log_ratio).mean())


def problem_of(proof: WeightProof, *, scores: Sequence[FloatArray], bits: int | None) -> str | None:
    """Why an engine with these scores of the canary and these bits does not hold the version; None: it does."""
    off = distance(scores, proof.logprobs)
    if off > BOUND[proof.precision]:
        return (
            f"its log-probs of the canary are {off:.2%} from the learner's, more than {BOUND[proof.precision]:.1%} in "
            f"{proof.precision}"
        )
    if bits is not None and proof.bits is not None and bits != proof.bits:
        return f"the bits of its weights add up to {bits:016x}, those of the version to {proof.bits:016x}"
    return None


def delivery_of(
    proof: WeightProof, *, scores: Sequence[FloatArray], bits: int | None, switch_s: float, proof_s: float
) -> Delivery:
    """What is told of an engine that holds the version."""
    return Delivery(
        switch_s=switch_s,
        proof_s=proof_s,
        canary_kl=canary_kl(scores, proof.logprobs),
        is_told_apart=None not in (bits, proof.bits) or proof.moved > 2.0 * BOUND[proof.precision],
    )
