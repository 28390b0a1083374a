"""What every engine promises, asked of each in the same words. The yardstick is a plain forward of transformers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_harness import MAX_LENGTH, Case, Harness, cases, incremental_logprobs, opened
from tiny_engines import EOS_ID, V1, prompt, reference_logprobs, reference_of, weights_of
from transformers import PreTrainedModel

from rexrag.engine.protocol import GenerateRequest, Generation

EXACT = 1e-5
"""Most that a log-prob in float32 may differ, in nats."""

VARIANTS = cases(
    ("llama", "keep"), ("llama-untied-biased-llama3rope", "recompute"), ("qwen2", "recompute"), ("qwen3", "keep")
)


@pytest.fixture(scope="module", params=VARIANTS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    case: Case = request.param
    with opened(case, tmp_path_factory.mktemp("model")) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Harness:
    """The shared engine with its first weights."""
    if shared.engine.version.step:
        shared.run(shared.change_to(0))
    return shared


async def generate(harness: Harness, *requests: GenerateRequest) -> list[Generation]:
    return list(await asyncio.gather(*(harness.engine.generate(request) for request in requests)))


def check(result: Generation, request: GenerateRequest, model: PreTrainedModel) -> None:
    """Everything that a forward pass over prompt and result can say of them."""
    ids = list(request.prompt_ids)
    np.testing.assert_allclose(result.logprobs, reference_of(model, ids, result.token_ids), atol=EXACT, rtol=0)
    if request.score_from is not None:
        expected = reference_of(model, ids[: request.score_from], ids[request.score_from :])
        np.testing.assert_allclose(result.scores, expected, atol=EXACT, rtol=0)
    if request.greedy:
        best = reference_logprobs(model, [*ids, *result.token_ids])[len(ids) - 1 : -1].argmax(-1)
        assert result.token_ids == best.tolist()
    assert len(result.versions) == len(result.token_ids) <= request.max_tokens
    assert len(result.score_versions) == len(result.scores)
    assert (result.token_ids[-1] == EOS_ID) == (result.finish == "eos")
    assert EOS_ID not in result.token_ids[:-1]


def test_logprobs_and_greedy_tokens_are_those_of_a_plain_forward(harness: Harness) -> None:
    requests = [
        harness.request(prompt(3 + 19 * i, seed=i), max_tokens=4 + 3 * i, seed=i, greedy=i % 2 == 0) for i in range(10)
    ]
    for request, result in zip(requests, harness.run(generate(harness, *requests)), strict=True):
        check(result, request, harness.models[0])
        assert set(result.versions) == {0}


def test_prompts_in_several_passes_are_sampled_and_scored_as_in_one(harness: Harness) -> None:
    ids = prompt(650)
    others = [harness.request(prompt(300, seed=seed), seed=seed) for seed in (1, 2)]
    scored = [harness.request(ids, score_from=start, seed=start) for start in (1, 500, 649, 650)]
    requests = [*others, *scored]
    for request, result in zip(requests, harness.run(generate(harness, *requests)), strict=True):
        check(result, request, harness.models[0])


def test_scores_of_what_is_cached_already_are_there_too(harness: Harness) -> None:
    ids, salt = prompt(100), harness.salt()
    for start in (90, 40, 1):
        request = harness.request(ids, score_from=start, cache_salt=salt)
        [result] = harness.run(generate(harness, request))
        check(result, request, harness.models[0])


def test_a_turn_and_a_probe_go_on_over_the_prefix(harness: Harness) -> None:
    """Observation and hint are computed, what came before is not."""
    salt, ids = harness.salt(), prompt(70)
    [first] = harness.run(generate(harness, harness.request(ids, seed=1, max_tokens=12, cache_salt=salt)))
    turn = [*ids, *first.token_ids, *prompt(6, seed=2)]
    kept, hint = [*ids, *first.token_ids[:3]], prompt(4, seed=3)
    requests = [
        harness.request(turn, cache_salt=salt),
        harness.request([*kept, *hint], cache_salt=salt, score_from=len(kept), seed=2),
    ]
    for request in requests:
        before = harness.engine.stats()
        [result] = harness.run(generate(harness, request))
        check(result, request, harness.models[0])
        after = harness.engine.stats()
        reused = after.reused_tokens - before.reused_tokens
        assert reused >= 64
        assert reused + after.prefilled_tokens - before.prefilled_tokens == len(request.prompt_ids)


def test_salts_share_nothing(harness: Harness) -> None:
    ids, salt = prompt(100), harness.salt()
    harness.run(generate(harness, harness.request(ids, cache_salt=salt)))
    before = harness.engine.stats().reused_tokens
    harness.run(generate(harness, harness.request(ids)))
    assert harness.engine.stats().reused_tokens == before
    harness.engine.release(salt)
    harness.run(generate(harness, harness.request(ids, cache_salt=salt)))
    assert harness.engine.stats().reused_tokens == before


def test_seeds_reproduce(harness: Harness) -> None:
    def texts(*seeds: int) -> list[list[int]]:
        requests = [harness.request(prompt(600), seed=seed, max_tokens=20) for seed in seeds]
        return [result.token_ids for result in harness.run(generate(harness, *requests))]

    first, second, third = texts(1, 2, 3)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert texts(3, 2) == [third, second]
    assert texts(1) == [first]


def test_stops_end_with_the_token_that_completes_them(harness: Harness) -> None:
    """The stop begins and ends within a token; that token is kept whole."""
    free = harness.request(prompt(8), max_tokens=30, seed=3)
    [result] = harness.run(generate(harness, free))
    text = harness.codec.decode(result.token_ids)
    stop = text[5:7]
    stopped = harness.request(prompt(8), max_tokens=30, seed=3, stop=("never there", stop))
    short = harness.request(prompt(8), max_tokens=2, seed=3)
    by_stop, by_length = harness.run(generate(harness, stopped, short))
    end = next(n for n in range(1, 31) if stop in harness.codec.decode(result.token_ids[:n]))
    assert (by_stop.finish, by_stop.token_ids) == ("stop", result.token_ids[:end])
    assert (by_length.finish, by_length.token_ids) == ("length", result.token_ids[:2])
    check(by_stop, stopped, harness.models[0])


def test_end_of_text_is_kept(harness: Harness) -> None:
    requests = [harness.request(prompt(8), max_tokens=110, seed=seed) for seed in range(8)]
    results = harness.run(generate(harness, *requests))
    assert "eos" in {result.finish for result in results}
    for request, result in zip(requests, results, strict=True):
        check(result, request, harness.models[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": MAX_LENGTH - 2}, f"exceed max_length {MAX_LENGTH}"),
        ({"prompt_ids": [1, 101]}, r"outside \[0, 101\)"),
        ({"prompt_ids": [-1]}, r"outside \[0, 101\)"),
        ({"score_from": 0}, "score_from 0"),
        ({"score_from": 4}, "score_from 4"),
    ],
)
def test_a_bad_prompt_is_refused_and_harms_nobody(harness: Harness, fields: dict[str, Any], message: str) -> None:
    good = [harness.request(prompt(40, seed=seed), max_tokens=10, seed=seed) for seed in range(3)]
    bad = harness.request(**{"prompt_ids": [1, 2, 3], **fields})

    async def run() -> list[Generation]:
        tasks = [asyncio.create_task(harness.engine.generate(request)) for request in good]
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match=message):
            await harness.engine.generate(bad)
        return list(await asyncio.gather(*tasks))

    for request, result in zip(good, harness.run(run()), strict=True):
        check(result, request, harness.models[0])


def test_cancelled_requests_leave_nothing_behind(harness: Harness) -> None:
    draws = random.Random(0)

    async def run() -> list[object]:
        requests = [harness.request(prompt(draws.randint(1, 200), seed=i), max_tokens=60, seed=i) for i in range(64)]
        tasks = [asyncio.create_task(harness.engine.generate(request)) for request in requests]
        for task in draws.sample(tasks, len(tasks)):
            await asyncio.sleep(0.01 * draws.random())
            task.cancel()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    assert any(isinstance(outcome, asyncio.CancelledError) for outcome in harness.run(run()))
    request = harness.request(prompt(50), seed=1)
    [result] = harness.run(generate(harness, request))
    check(result, request, harness.models[0])
    stats = harness.engine.stats()
    assert (stats.running, stats.waiting, stats.cache_use) == (0, 0, 0.0)


def crossing_requests(harness: Harness) -> list[GenerateRequest]:
    """Two that share a prompt, and two that do not."""
    salt = harness.salt()
    return [
        *(harness.request(prompt(30), max_tokens=40, seed=seed, cache_salt=salt) for seed in (1, 2)),
        harness.request(prompt(7, seed=3), max_tokens=30, seed=3),
        harness.request(prompt(50, seed=4), max_tokens=35, seed=4, greedy=True),
    ]


@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 0, 2]])
def test_weights_change_under_running_sequences(harness: Harness, steps: list[int]) -> None:
    """`keep` goes on over old keys and values, `recompute` equals a full forward under each token's version."""
    requests = crossing_requests(harness)

    async def run() -> list[Generation]:
        tasks = [asyncio.create_task(harness.engine.generate(request)) for request in requests]
        for step in steps:
            target = harness.engine.stats().sampled_tokens + 17
            while harness.engine.stats().sampled_tokens < target:
                await asyncio.sleep(0)
            await harness.change_to(step)
            assert harness.engine.version.step == step
        return list(await asyncio.gather(*tasks))

    results = harness.run(run())
    assert any(set(result.versions) == {0, *steps} for result in results)
    for request, result in zip(requests, results, strict=True):
        if harness.case.inflight == "keep":
            expected = incremental_logprobs(harness.models, request.prompt_ids, result)
        else:
            forwards = [reference_of(model, request.prompt_ids, result.token_ids) for model in harness.models]
            expected = np.stack(forwards)[result.versions, np.arange(len(result.versions))]
        np.testing.assert_allclose(result.logprobs, expected, atol=EXACT, rtol=0)


def test_equal_weights_change_no_token(harness: Harness) -> None:
    """The draws of a sequence do not notice that it is interrupted."""
    undisturbed = harness.run(generate(harness, *crossing_requests(harness)))

    async def run() -> list[Generation]:
        requests = crossing_requests(harness)
        tasks = [asyncio.create_task(harness.engine.generate(request)) for request in requests]
        target = harness.engine.stats().sampled_tokens + 20
        while harness.engine.stats().sampled_tokens < target:
            await asyncio.sleep(0)
        await harness.change_to(0)
        return list(await asyncio.gather(*tasks))

    disturbed = harness.run(run())
    assert [result.token_ids for result in disturbed] == [result.token_ids for result in undisturbed]


def test_a_later_salt_reads_nothing_of_the_old_version(harness: Harness) -> None:
    ids, old_salt = prompt(100), harness.salt()
    harness.run(generate(harness, harness.request(ids, cache_salt=old_salt)))
    harness.run(harness.change_to(1))
    before = harness.engine.stats().reused_tokens
    request = harness.request(ids, score_from=50)
    [result] = harness.run(generate(harness, request))
    check(result, request, harness.models[1])
    assert set(result.versions) | set(result.score_versions) == {1}
    assert harness.engine.stats().reused_tokens == before
    harness.run(generate(harness, harness.request(ids, cache_salt=old_salt)))
    assert (harness.engine.stats().reused_tokens > before) == (harness.case.inflight == "keep")


def test_a_step_that_changed_nothing_gives_a_version_and_costs_nothing(harness: Harness) -> None:
    ids, salt = prompt(70), harness.salt()
    harness.run(generate(harness, harness.request(ids, cache_salt=salt)))
    before = harness.engine.stats().reused_tokens
    harness.run(harness.engine.update_weights(V1, None))
    request = harness.request(ids, cache_salt=salt, seed=4)
    [result] = harness.run(generate(harness, request))
    check(result, request, harness.models[0])
    assert set(result.versions) == {V1.step}
    assert harness.engine.stats().reused_tokens - before >= 64


def test_bfloat16_bits_in_read_only_arrays_are_taken(harness: Harness) -> None:
    bits: dict[str, npt.NDArray[np.generic]] = {}
    rounded = harness.models[2]
    original = weights_of(rounded)
    try:
        for name, parameter in rounded.named_parameters():
            half = parameter.detach().bfloat16()
            bits[name] = half.view(torch.uint16).numpy()
            bits[name].setflags(write=False)
            parameter.data.copy_(half)
        harness.run(harness.engine.update_weights(V1, bits))
        request = harness.request(prompt(40), score_from=1)
        [result] = harness.run(generate(harness, request))
        check(result, request, rounded)
    finally:
        for name, parameter in rounded.named_parameters():
            parameter.data.copy_(torch.from_numpy(original[name]))


def test_weights_that_do_not_fit_change_nothing(harness: Harness) -> None:
    good = weights_of(harness.models[1])
    name = "model.layers.0.mlp.up_proj.weight"
    bad: list[tuple[dict[str, npt.NDArray[np.generic]], str]] = [
        ({key: value for key, value in good.items() if key != name}, f"missing, such as {name}"),
        ({**good, "another.weight": good[name]}, r"unknown, such as another\.weight"),
        ({**good, name: good[name].T}, f"weight {name} has shape"),
        ({**good, name: good[name].astype(np.float64)}, f"weight {name} is float64"),
    ]
    for weights, message in bad:
        with pytest.raises(ValueError, match=message):
            harness.run(harness.engine.update_weights(V1, weights))
    assert harness.engine.version.step == 0
    request = harness.request(prompt(40))
    [result] = harness.run(generate(harness, request))
    check(result, request, harness.models[0])
