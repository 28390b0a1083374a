"""Whole runs of the command line on a small world, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.preparation.warmstart import warm_start
from rexrag.retrieval.bm25 import build_bm25
from rexrag.worlds.write import world_texts, write_world

RECIPE = """
[model]
path = "{folder}/model"
[data]
train = "{folder}/world/train.jsonl"
dev = "{folder}/world/dev.jsonl"
eval = "{folder}/world/test.jsonl"
[retriever]
path = "{folder}/index"
[env]
max_turns = 3
max_turn_tokens = 40
max_observation_tokens = 64
max_trajectory_tokens = 400
top_k = 2
[reward]
kind = "em + format"
format_weight = 0.5
[rollout]
group_size = 3
episodes_per_actor = 24
dtype = "float32"
[replay]
max_staleness = 1
[optimizer]
learning_rate = 1e-3
[learner]
autocast = "float32"
[train]
steps = 4
groups_per_step = 8
checkpoint_every = 2
[eval]
every = 2
max_questions = 8
"""
TIMEOUT_S = 600.0
SIZE = {"train": 200, "dev": 8, "test": 8, "demonstrations": 400, "entities": 60, "distractors": 0, "words": 20}


def small_world(folder: Path, *, num_demonstrations: int = SIZE["demonstrations"], **model: int) -> Path:
    """A small world, its index and a tiny model that has learnt the format; the recipe over them, its paths absolute.

    Args:
        model: sizes of the tiny model, over those that `make_tiny_model` has.
    """
    files = write_world("synthetic", folder / "world", seed=1, size={**SIZE, "demonstrations": num_demonstrations})
    build_bm25(files.corpus, folder / "index")
    sizes = {"width": 64, "num_layers": 2, "feed_forward": 128, **model}
    make_tiny_model(world_texts(files.folder), folder / "untrained", seed=1, **sizes)
    warm_start(
        folder / "untrained",
        demonstrations=files.demonstrations,
        out=folder / "model",
        learning_rate=5e-3,
        batch_size=16,
        epochs=1,
        threads=2,
    )
    path = folder / "small.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def start_rexrag(*words: str | Path) -> subprocess.Popen[str]:
    """`rexrag WORDS` as a process of its own; its progress goes to a pipe."""
    command = [sys.executable, "-m", "rexrag", *map(str, words)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_rexrag(*words: str | Path, status: int = 0, timeout_s: float = TIMEOUT_S) -> str:
    """Run to the end, assert the exit status, return what stood on stderr."""
    process = start_rexrag(*words)
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == status, f"exit {process.returncode}, not {status}:\n{errors}"
    return errors


def wait_for(condition: Callable[[], bool], *, process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[1]}"
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.1)


class Watch:
    """A run as `rexrag status --json --watch` shows it: one process for all questions, where each would start Ray's."""

    def __init__(self, run: Path, *, environment: Mapping[str, str] = os.environ) -> None:
        self._run, self._environment = run, dict(environment)
        self._process: subprocess.Popen[str] | None = None
        self._said: list[dict[str, Any]] = []

    def until(
        self, is_so: Callable[[dict[str, Any]], bool], *, process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Wait until the run's status, told from now on, is so; `process` is the run's own."""
        deadline = time.monotonic() + timeout_s
        before = len(self._said)
        while True:
            if len(self._said) > before and is_so(told := self._said[-1]):
                return told
            assert process.poll() is None, f"the run ended early; last seen: {self._said[-1:]}"
            assert time.monotonic() < deadline, f"not so in time: {self._said[-1:]}"
            if self._process is None or self._process.poll() is not None:
                self._start()
            time.sleep(0.1)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        """A run says where its Ray is when it goes on."""
        if (self._run / "cluster.json").exists():
            command = [sys.executable, "-m", "rexrag", "status", "--run", str(self._run), "--json", "--watch"]
            out = subprocess.PIPE
            self._process = subprocess.Popen(command, env=self._environment, stdout=out, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):  # the last one may be cut
                self._said.append(json.loads(line))


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def read_lines(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def child_of(process: subprocess.Popen[str], *, title: str) -> list[psutil.Process]:
    """Processes below a run whose title contains a text: Ray names its workers after their actors."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_books_balance(run: Path) -> dict[str, object]:
    accounting: dict[str, object] = json.loads((run / "accounting.json").read_text())
    dropped = accounting["dropped"]
    assert isinstance(dropped, dict)
    numbers: Sequence[int] = [*dropped.values(), int(str(accounting["consumed"])), int(str(accounting["pending"]))]
    assert accounting["issued"] == sum(numbers)
    return accounting
