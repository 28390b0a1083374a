"""Draws at temperature 1 and log-probs, from logits that are made and spent block by block.

Legend: M rows (sequences or positions), V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MAX_ROWS: Final = 128
"""Rows whose logits are held at once: bounds the memory of a large vocabulary."""

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MASK: Final = (1 << 64) - 1


def counter_uniforms(seeds: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """[M] Uniforms in (0, 1), each a function of its (seed, counter) alone: streams of splitmix64.

    Zero would draw the first token however unlikely it is: the 2^52 values are midpoints.
    """
    bits = counter_bits(seeds, counters)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def counter_bits(seeds: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.uint64]:
    """[M] 64 random bits, a function of their (seed, counter) alone: streams of splitmix64."""
    seed = np.array([value & _MASK for value in seeds], dtype=np.uint64)
    counter = np.array(counters, dtype=np.uint64)
    return _mix(_mix(seed + _GOLDEN) + (counter + np.uint64(1)) * _GOLDEN)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Sampler:
    """Turns hidden states into tokens with the log-probs of the distribution that they were drawn from.

    A draw is the inverse of the cumulative distribution at one uniform: first the block of about sqrt(V) tokens, then
    the token within it, so that no cumulative sum over the vocabulary is needed. Sums over blocks are float64.

    Args:
        head: from hidden states [M, D] to logits [M, V].
        device: where it computes; what it takes and gives besides hidden states is on the CPU.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], *, vocab_size: int, device: torch.device) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._block_size = math.isqrt(vocab_size - 1) + 1
        self._num_blocks = -(-vocab_size // self._block_size)
        self._device = device
        self._buffer = torch.empty(_MAX_ROWS, self._num_blocks * self._block_size, device=device)

    def sample(
        self, hidden: Tensor, *, uniforms: npt.NDArray[np.float64], greedy: npt.NDArray[np.bool_]
    ) -> tuple[list[int], list[float]]:
        """One token per row and its log-prob (float32 precision), the argmax where `greedy`.

        Args:
            hidden: [M, D] after the last norm.
            uniforms: [M] in (0, 1).
            greedy: [M].
        """
        tokens: list[int] = []
        logprobs: list[float] = []
        for start in range(0, len(hidden), _MAX_ROWS):
            block = slice(start, start + _MAX_ROWS)
            drawn = self._sample_block(
                hidden[block], torch.from_numpy(uniforms[block]), torch.from_numpy(greedy[block])
            )
            tokens += drawn[0].tolist()
            logprobs += drawn[1].tolist()
        return tokens, logprobs

    def score(self, hidden: Tensor, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of given tokens, one per row of `hidden` [M, D] after the last norm."""
        scores: list[float] = []
        for start in range(0, len(hidden), _MAX_ROWS):
            logits = self._head(hidden[start : start + _MAX_ROWS]).float()
            target = torch.tensor(token_ids[start : start + _MAX_ROWS], device=self._device)
            chosen = logits.gather(1, target[:, None])[:, 0]
            scores += (chosen - logits.logsumexp(1)).tolist()
        return scores

    def _sample_block(self, hidden: Tensor, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        if greedy.any():
            maximum, best = logits.max(1)
        else:
            maximum, best = logits.amax(1), None
        weights = logits.sub_(maximum[:, None]).exp_()  # unnormalised probabilities, the largest is 1
        tokens, total = self._invert_cdf(weights, uniforms.to(self._device))
        if best is not None:
            tokens = torch.where(greedy.to(self._device), best, tokens)
        chosen = weights.gather(1, tokens[:, None])[:, 0].double()
        return tokens, (chosen.log() - total.log()).float()

    def _invert_cdf(self, weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """[M] tokens of positive weight, and [M] sums of the weights."""
        rows = torch.arange(len(weights), device=self._device)
        blocks = weights.view(-1, self._num_blocks, self._block_size)
        block_sums = blocks.sum(2).double()
        block_cdf = block_sums.cumsum(1)
        total = block_cdf[:, -1]
        target = uniforms * total
        block = _first_above(block_cdf, target)
        before = block_cdf[rows, block] - block_sums[rows, block]
        cdf = blocks[rows, block].double().cumsum(1)
        # The two sums differ in rounding: on the block's own scale the target stays inside it.
        inside = (target - before) * (cdf[:, -1] / block_sums[rows, block])
        return block * self._block_size + _first_above(cdf, inside.clamp_(min=0)), total

    def _logits(self, hidden: Tensor) -> Tensor:
        """[M, V padded to whole blocks with -inf] float32 logits, in the buffer that the next call overwrites."""
        logits = self._buffer[: len(hidden)]
        logits[:, : self._vocab_size] = self._head(hidden)
        logits[:, self._vocab_size :] = -math.inf
        return logits


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """[M] First column of [M, n] whose cumulative sum exceeds the target, at most the last one of positive weight."""
    return torch.minimum((cdf <= target[:, None]).sum(1), (cdf < cdf[:, -1:]).sum(1))
