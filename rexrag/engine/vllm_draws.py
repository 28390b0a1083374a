"""The draws of vLLM's model runner on CPUs, made what the protocol promises: of (seed, i) alone.

The runner keeps one generator for each seeded request. Of a prompt in several passes it takes back what the early ones
drew, by setting the generator back: those of CPUs cannot be, and the pass fails. Here each generator begins anew
before each pass, from its request's seed and the number of tokens that it has sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rexrag.engine.sampling import counter_bits


class _Draws(torch.Generator):
    """A generator that need not be set back."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


def count_draws(runner: Any) -> None:  # noqa: ANN401
    """Change a runner, vLLM's `GPUModelRunner` or what derives from it on CPUs, before its first pass."""
    update: Callable[[Any], Any] = runner._update_states

    def update_and_seed(scheduled: Any) -> Any:  # noqa: ANN401
        done = update(scheduled)
        _seed_all(runner)
        return done

    runner._update_states = update_and_seed


def _seed_all(runner: Any) -> None:  # noqa: ANN401
    batch = runner.input_batch
    keys = {index: key for key, index in batch.req_id_to_index.items() if index in batch.generators}
    requests = [runner.requests[key] for key in keys.values()]
    seeds = [request.sampling_params.seed for request in requests]
    counters = [len(request.output_token_ids) for request in requests]
    for index, request, bits in zip(keys, requests, counter_bits(seeds, counters).tolist(), strict=True):
        if not isinstance(request.generator, _Draws):
            request.generator = batch.generators[index] = _Draws()
        request.generator.manual_seed(bits >> 1)  # torch takes no seed of 64 bits
