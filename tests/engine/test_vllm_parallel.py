"""An engine over vLLM whose model is spread over two processes, as it is over two GPUs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tiny_engines import V1, Letters, make_model, make_vllm_engine, needs_vllm, prompt, reference_of, weights_of
from transformers import PreTrainedModel

from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.vllm_engine import VllmEngine
from rexrag.errors import EngineBrokenError, EnginePassError, ModelError

pytestmark = [pytest.mark.vllm, needs_vllm, pytest.mark.timeout(900)]

T = TypeVar("T")


class Pair:
    """Two models, and an engine that begins with the weights of the first."""

    def __init__(self, folder: Path) -> None:
        self.models: list[PreTrainedModel] = [make_model("qwen2", seed=seed, head_dim=32) for seed in range(2)]
        self.engine: VllmEngine = make_vllm_engine(self.models[0], folder=folder, codec=Letters(), tensor_parallel=2)
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(work, 120.0))

    def worst(self, model: PreTrainedModel, request: GenerateRequest) -> float:
        """Largest distance of the log-probs that the engine records from those of a plain forward pass."""
        result = self.run(self.engine.generate(request))
        expected = reference_of(model, request.prompt_ids, result.token_ids)
        return float(np.abs(np.array(result.logprobs) - expected).max())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("model"))
    yield pair
    pair.run(pair.engine.close())


def test_log_probs_are_those_of_the_whole_model_before_and_after_a_weight_change_and_a_dead_process_ends_it(
    pair: Pair,
) -> None:
    request = GenerateRequest(prompt_ids=prompt(40), max_tokens=24, seed=3)
    first = pair.run(pair.engine.generate(request))
    assert pair.run(pair.engine.generate(request)).token_ids == first.token_ids, "draws are of the seed"
    assert pair.worst(pair.models[0], request) < 1e-5
    left = set(Path("/dev/shm").glob("rexrag-weights-*"))  # of processes that were killed
    pair.run(pair.engine.update_weights(V1, weights_of(pair.models[1])))
    assert pair.worst(pair.models[1], replace(request, cache_salt="a later group")) < 1e-5
    scored = GenerateRequest(prompt_ids=prompt(40, seed=1), max_tokens=1, greedy=True, score_from=20, cache_salt="b")
    scores = pair.run(pair.engine.generate(scored)).scores
    expected = reference_of(pair.models[1], scored.prompt_ids[:20], scored.prompt_ids[20:])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert not set(Path("/dev/shm").glob("rexrag-weights-*")) - left, "the bytes are freed once all have switched"

    pids = pair.engine._core._client.collective_rpc(lambda worker: os.getpid())
    assert len({*pids, os.getpid()}) == 3
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises((EnginePassError, EngineBrokenError)):
        pair.run(pair.engine.generate(request))
    with pytest.raises(EngineBrokenError, match="the engine is dead"):
        pair.run(pair.engine.generate(request))


def test_heads_that_cannot_be_dealt_evenly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rollout\.tensor_parallel = 4: the model's 6 num_attention_heads cannot"):
        make_vllm_engine(make_model("qwen2", head_dim=32), folder=tmp_path, codec=Letters(), tensor_parallel=4)
