"""New weights for an engine, and the proof that they are what it computes with."""

from __future__ import annotations

import logging
import time
from typing import Final

import numpy as np

from rexrag.engine.protocol import Engine, GenerateRequest
from rexrag.errors import EngineBrokenError, EnginePassError, first_line
from rexrag.model.weight_proof import Canary, Delivery, WeightUpdate, delivery_of, problem_of
from rexrag.types import FloatArray, WeightVersion

LOG = logging.getLogger(__name__)

ATTEMPTS: Final = 2
"""Transfers of one version: what went wrong once may have been the transfer, twice it is the engine."""


async def deliver(
    engine: Engine, version: WeightVersion, update: WeightUpdate | None, *, actor_id: str
) -> Delivery | None:
    """Switch the engine to a version and look at what it then holds.

    Returns:
        None where there is nothing to prove: the weights stay, or there is no canary.

    Raises:
        EngineBrokenError: the engine holds other weights after the second transfer too, or fails to show which.
    """
    if update is None or not update.proof.canary:
        await engine.update_weights(version, None if update is None else update.weights)
        return None
    problem = ""
    for _ in range(ATTEMPTS):
        switch_s = await engine.update_weights(version, update.weights)
        began = time.monotonic()
        try:
            scores = await _scores(engine, update.proof.canary, version)
            bits = await engine.bit_sum()
            found = problem_of(update.proof, scores=scores, bits=bits)
        except EnginePassError as error:
            found = f"its pass over the canary failed ({first_line(error)})"
        if found is None:
            proof_s = time.monotonic() - began
            return delivery_of(update.proof, scores=scores, bits=bits, switch_s=switch_s, proof_s=proof_s)
        problem = found
        LOG.warning("the engine of %s does not show the weights of step %d: %s", actor_id, version.step, problem)
    raise EngineBrokenError(
        f"the engine of {actor_id} does not show the weights of step {version.step}, given twice: {problem}"
    )


async def _scores(engine: Engine, canary: Canary, version: WeightVersion) -> list[FloatArray]:
    """One prompt after the other: all at once would wait for as many free places in the engine."""
    salt = f"canary {version.incarnation} {version.step}"
    scores = []
    for ids in canary:
        request = GenerateRequest(prompt_ids=ids, max_tokens=1, greedy=True, cache_salt=salt, score_from=1)
        try:
            scores.append(np.array((await engine.generate(request)).scores, np.float32))
        finally:
            engine.release(salt)
    return scores
