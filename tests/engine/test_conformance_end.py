"""How every engine fails and ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from engine_harness import Case, Harness, cases, opened
from tiny_engines import V1, prompt, reference_of, weights_of

from rexrag.engine.protocol import EngineClosedError
from rexrag.errors import EnginePassError


@pytest.mark.parametrize("case", cases(("llama", "keep")))
def test_an_engine_fails_recovers_and_closes(case: Case, tmp_path: Path) -> None:
    with opened(case, tmp_path) as harness:
        harness.run(check_failed_passes(harness))
        harness.run(check_diverged_weights(harness))
        harness.run(check_close(harness))


async def check_failed_passes(harness: Harness) -> None:
    """Everybody in the pass gets the error, and the next one begins anew."""
    harness.codec.broken = True
    failing = [harness.request(prompt(5, seed=i), max_tokens=5, stop=("x",) if i == 0 else ()) for i in range(5)]
    outcomes = await asyncio.gather(*(harness.engine.generate(r) for r in failing), return_exceptions=True)
    harness.codec.broken = False
    assert all(isinstance(outcome, EnginePassError) and "no such token" in str(outcome) for outcome in outcomes)
    assert (harness.engine.stats().running, harness.engine.stats().waiting) == (0, 0)
    await check_works(harness)


async def check_diverged_weights(harness: Harness) -> None:
    """They are an error, not a token."""
    broken = weights_of(harness.models[0])
    broken["model.norm.weight"] = np.full_like(broken["model.norm.weight"], np.nan)
    await harness.engine.update_weights(V1, broken)
    with pytest.raises(EnginePassError, match="diverged"):
        await harness.engine.generate(harness.request([1, 2], max_tokens=2))
    await harness.change_to(0)
    await check_works(harness)


async def check_works(harness: Harness) -> None:
    request = harness.request(prompt(5, seed=9))
    result = await harness.engine.generate(request)
    expected = reference_of(harness.models[0], request.prompt_ids, result.token_ids)
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-5, rtol=0)


async def check_close(harness: Harness) -> None:
    """It ends what is pending, and may be called again."""
    engine = harness.engine
    requests = [harness.request([i], max_tokens=600) for i in range(12)]
    pending = [asyncio.create_task(engine.generate(request)) for request in requests]
    before = engine.stats().sampled_tokens
    while engine.stats().sampled_tokens == before:
        await asyncio.sleep(0.001)
    await engine.close()
    outcomes = await asyncio.gather(*pending, return_exceptions=True)
    assert any(isinstance(outcome, EngineClosedError) for outcome in outcomes)
    with pytest.raises(EngineClosedError):
        await engine.generate(harness.request([1]))
    with pytest.raises(EngineClosedError):
        await engine.update_weights(V1, None)
    await engine.close()
