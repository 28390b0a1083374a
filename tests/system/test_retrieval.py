"""Whole runs whose retriever is hurt: a search actor is killed, a server is gone for seconds. No question is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from free_ports import free_ports
from own_server import served
from system_runs import (
    TIMEOUT_S,
    assert_books_balance,
    child_of,
    num_steps,
    read_lines,
    run_rexrag,
    start_rexrag,
    wait_for,
)
from tiny_encoders import make_encoder

from rexrag.retrieval.dense_build import DenseSettings, build_dense

pytestmark = pytest.mark.system


def start(recipe: Path, run: Path, *settings: str) -> subprocess.Popen[str]:
    words = ("train.steps=100000", "eval.every=0", "eval.max_questions=2", *settings)
    return start_rexrag("train", recipe, "--run-dir", run, *(f"--set={word}" for word in words))


def warnings_of(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [str(line) for line in lines if "WARNING" in str(line)]


def is_told(run: Path, words: str) -> bool:
    return any(words in line for line in warnings_of(run))


def stopped(run: Path, process: subprocess.Popen[str]) -> dict[str, int]:
    """Each group of the steps made is accounted for; returns the dropped ones by reason."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, errors
    accounting = assert_books_balance(run)
    assert accounting["consumed"] == num_steps(run) * 8
    dropped = accounting["dropped"]
    assert isinstance(dropped, dict)
    return dropped


def assert_nothing_lost(run: Path, dropped: dict[str, int]) -> None:
    assert not dropped.get("env_error"), dropped
    assert sum(line["search/failed"] or 0 for line in read_lines(run / "metrics.jsonl")) == 0


def test_a_pool_inside_the_run_survives_the_death_of_its_actor(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(recipe, run, "retriever.kind=ray", "retriever.num_cpus=0.5")
    try:
        wait_for(lambda: num_steps(run) >= 1, process=process)
        (actor,) = child_of(process, title="ray::SearchActor")
        actor.kill()
        wait_for(lambda: is_told(run, "search actor search-0 died and is back"), process=process)
        assert_nothing_lost(run, stopped(run, process))
    finally:
        process.kill()


def train_through_outage(recipe: Path, run: Path, *settings: str, seconds: float) -> dict[str, int]:
    """A run whose search server is killed after the first step, and is back after it was missed for some seconds; its
    dropped groups by reason."""
    index = recipe.parent / "index"
    (port,) = free_ports(1)
    with served(index, port=port) as (url, server):
        process = start(recipe, run, "retriever.kind=http", f"retriever.url={url}", *settings)
        try:
            wait_for(lambda: num_steps(run) >= 1, process=process)
            server.kill()
            server.wait()
            wait_for(lambda: is_told(run, "does not answer: searches wait"), process=process)
            time.sleep(seconds)
            with served(index, port=port):
                wait_for(lambda: is_told(run, "answers again, after"), process=process)
                steps = num_steps(run)
                wait_for(lambda: num_steps(run) >= steps + 2, process=process)
                return stopped(run, process)
        finally:
            process.kill()


def test_a_server_that_is_gone_for_seconds_is_waited_for(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_nothing_lost(run, train_through_outage(recipe, run, "rollout.num_actors=1", seconds=2.0))
    lines = read_lines(run / "metrics.jsonl")
    assert sum(line["search/outages"] or 0 for line in lines) >= 1
    assert sum(line["search/outage_s"] or 0 for line in lines) > 1.0
    told = warnings_of(run)  # of one actor: each has a breaker of its own
    assert sum("does not answer: searches wait" in line for line in told) == 1
    assert sum("answers again, after" in line for line in told) == 1


@pytest.mark.slow
def test_an_outage_longer_than_a_search_waits_costs_what_was_begun_and_no_more(recipe: Path, tmp_path: Path) -> None:
    """A search gives up after about two seconds, the server is gone for 15: no new question is burnt meanwhile."""
    bounds = ("retriever.timeout_s=1", "retriever.max_retries=1")
    dropped = train_through_outage(recipe, tmp_path / "run", *bounds, seconds=15.0)
    assert dropped.get("env_error", 0) <= 2 * 8, "groups that were at hand, of two actors at most"


def test_a_dense_index_in_the_process_and_in_an_evaluation(recipe: Path, tmp_path: Path) -> None:
    run, index, world = tmp_path / "run", tmp_path / "dense", recipe.parent / "world"
    encoder = make_encoder(tmp_path / "encoder", dimension=16)
    build_dense(world / "corpus.jsonl", index, encoder=encoder, settings=DenseSettings(precision="fp16"))
    process = start(recipe, run, "retriever.kind=faiss", f"retriever.path={index}", "train.steps=2")
    try:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert num_steps(run) == 2
    run_rexrag("eval", run, "--questions", world / "dev.jsonl", "--index", index, "--out", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["n"] == 8
