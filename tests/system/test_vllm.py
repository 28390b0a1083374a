"""The main job with vLLM as the engine: weights arrive, log-probs are those that the learner computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from system_runs import assert_books_balance, read_lines, run_rexrag, small_world
from tiny_engines import needs_vllm

import rexrag.metrics as keys

pytestmark = [pytest.mark.system, pytest.mark.vllm, needs_vllm]

EXACT_KL = 1e-8
"""Nats a token: what float32 leaves of a divergence that is zero."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world, with a model whose heads are as wide as vLLM's attention on CPUs wants them."""
    return small_world(tmp_path_factory.mktemp("small"), num_demonstrations=200, num_heads=2, num_kv_heads=1)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_run_trains_on_what_vllm_sampled_under_the_weights_that_it_was_sent(
    recipe: Path, tmp_path: Path, tensor_parallel: int
) -> None:
    """With `recompute` log-probs are those of a full pass, after each weight change in mid-trajectory, too."""
    run = tmp_path / "run"
    settings = (
        'rollout.engine="vllm"', "rollout.num_actors=1", "rollout.threads_per_actor=1", 'weights.inflight="recompute"',
        f"rollout.tensor_parallel={tensor_parallel}",
    )  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    run_rexrag("train", recipe, "--run-dir", run, *overrides, timeout_s=800)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert assert_books_balance(run)["consumed"] == 4 * 8
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    divergences = [line[keys.POLICY_MISMATCH_KL] for line in lines]
    known = [value for value in divergences if value is not None]
    assert len(known) > 1, "tokens were sampled under versions that were sent"
    assert max(known) < EXACT_KL
