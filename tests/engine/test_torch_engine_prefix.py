"""Prefix reuse over turns, groups and probes: nothing is computed twice, and nothing comes out differently."""

from __future__ import annotations

import asyncio

import numpy as np
from tiny_engines import make_engine, make_model, prompt, reference_of

from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.torch_engine import TorchEngine


async def episode(
    engine: TorchEngine, *, seed: int, salt: str, turns: int = 3
) -> tuple[list[int], list[float], list[int]]:
    """Turns with observations in between; token ids, log-probs of the sampled ones, and their positions."""
    ids = prompt(25)
    logprobs: list[float] = []
    positions: list[int] = []
    for turn in range(turns):
        request = GenerateRequest(prompt_ids=ids, max_tokens=6, seed=100 * seed + turn, cache_salt=salt)
        result = await engine.generate(request)
        positions += range(len(ids), len(ids) + len(result.token_ids))
        logprobs += result.logprobs
        ids = [*ids, *result.token_ids, *prompt(5, seed=10 * seed + turn)]
    return ids, logprobs, positions


def test_episodes_go_on_over_their_own_cache() -> None:
    model = make_model("llama")

    async def run() -> TorchEngine:
        engine = make_engine(model, max_sequences=8)
        episodes = await asyncio.gather(*(episode(engine, seed=seed, salt="g") for seed in range(6)))
        await engine.close()
        for ids, logprobs, positions in episodes:
            expected = reference_of(model, ids[:1], ids[1:])[np.array(positions) - 1]
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)
        return engine

    stats = asyncio.run(run()).stats()
    # The prompt once; then each later turn its 5 observation tokens and the last sampled one.
    assert stats.prefilled_tokens == 25 + 6 * 2 * 6
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_probe_reuses_its_parents_prefix_and_scores_its_hint() -> None:
    model = make_model("qwen3")

    async def run() -> None:
        engine = make_engine(model)
        parent = await engine.generate(GenerateRequest(prompt_ids=prompt(25), max_tokens=12, seed=1, cache_salt="g"))
        kept, hint = [*prompt(25), *parent.token_ids[:6]], prompt(4, seed=9)
        before = engine.stats()
        request = GenerateRequest(prompt_ids=[*kept, *hint], max_tokens=5, seed=2, cache_salt="g", score_from=len(kept))
        probe = await engine.generate(request)
        stats = engine.stats()
        assert stats.prefilled_tokens - before.prefilled_tokens == len(hint) + 1
        assert stats.reused_tokens - before.reused_tokens == len(kept) - 1
        np.testing.assert_allclose(probe.scores, reference_of(model, kept, hint), atol=1e-4)
        expected = reference_of(model, [*kept, *hint], probe.token_ids)
        np.testing.assert_allclose(probe.logprobs, expected, atol=1e-4)
        # The parent's own cache is still whole.
        whole = [*prompt(25), *parent.token_ids, 3]
        going_on = await engine.generate(GenerateRequest(prompt_ids=whole, max_tokens=4, cache_salt="g"))
        assert engine.stats().prefilled_tokens - stats.prefilled_tokens == 2
        np.testing.assert_allclose(going_on.logprobs, reference_of(model, whole, going_on.token_ids), atol=1e-4)
        await engine.close()

    asyncio.run(run())


def test_other_salts_compute_the_prompt_themselves() -> None:
    async def run() -> None:
        engine = make_engine(make_model("llama"))
        for salt in "abc":
            await engine.generate(GenerateRequest(prompt_ids=prompt(20), max_tokens=2, cache_salt=salt))
        assert (engine.stats().prefilled_tokens, engine.stats().reused_tokens) == (60, 0)
        engine.release("a")
        await engine.generate(GenerateRequest(prompt_ids=prompt(20), max_tokens=2, cache_salt="a"))
        assert (engine.stats().prefilled_tokens, engine.stats().reused_tokens) == (80, 0)
        await engine.close()

    asyncio.run(run())


def test_more_episodes_than_slots_give_the_same_results() -> None:
    model = make_model("llama")

    async def run(max_sequences: int) -> list[tuple[list[int], list[float], list[int]]]:
        engine = make_engine(model, max_sequences=max_sequences)
        episodes = await asyncio.gather(*(episode(engine, seed=seed, salt=str(seed // 2)) for seed in range(8)))
        await engine.close()
        return list(episodes)

    few, many = asyncio.run(run(2)), asyncio.run(run(8))
    assert [ids for ids, _, _ in few] == [ids for ids, _, _ in many]


def test_who_answers_at_once_is_in_the_next_pass() -> None:
    async def run() -> None:
        engine = make_engine(make_model("llama"), max_length=400, endless=True)
        long = asyncio.create_task(engine.generate(GenerateRequest(prompt_ids=[1], max_tokens=300)))
        while engine.stats().sampled_tokens < 5:
            await asyncio.sleep(0)

        async def turn(ids: list[int]) -> list[int]:
            result = await engine.generate(GenerateRequest(prompt_ids=ids, max_tokens=1, cache_salt="e"))
            return result.token_ids

        ids = [2]
        ids += await turn(ids)
        before = engine.stats().sampled_tokens
        for _ in range(10):
            async with asyncio.TaskGroup() as tasks:
                child = tasks.create_task(turn(ids))
            ids += child.result()
        # Each pass gave one token to the long request and one to a turn: no pass went by without the turn.
        assert engine.stats().sampled_tokens - before == 20
        long.cancel()
        await engine.close()

    asyncio.run(run())
