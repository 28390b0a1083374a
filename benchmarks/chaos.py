"""A run that is hurt again and again: what it costs, and whether anything is lost or trained twice.

    python benchmarks/chaos.py --steps 120 --out benchmarks/results/chaos.json
    python benchmarks/chaos_table.py                     # the section of docs/results.md

A small run in an invented world goes on while its processes are killed at random moments (kill -9 of rollout actors,
the moment that weights are pushed to them too, of learner, buffer and driver) and its search server refuses, fails,
hangs or vanishes. After each end the same command is given again. The books come from the replay log, progress from
the lines of `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import psutil
from machine import commit, machine

from rexrag.buffer.log import read_log
from rexrag.buffer.records import Begin, Finish, Outcome
from rexrag.buffer.segments import segments
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.preparation.warmstart import warm_start
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.types import Passage
from rexrag.worlds.write import world_texts, write_world

GROUPS_PER_STEP: Final = 4
SIZE: Final = {"train": 200, "dev": 8, "test": 8, "demonstrations": 200, "entities": 60, "distractors": 0, "words": 20}
RECIPE: Final = """
[model]
path = "{folder}/model"
[data]
train = "{folder}/world/train.jsonl"
[retriever]
kind = "http"
url = "{url}"
timeout_s = 2.0
max_retries = 3
[env]
max_turns = 2
max_turn_tokens = 40
max_observation_tokens = 64
max_trajectory_tokens = 300
top_k = 2
[rollout]
group_size = 2
num_actors = 2
episodes_per_actor = 8
dtype = "float32"
[replay]
max_staleness = 1
[learner]
autocast = "float32"
[train]
steps = {steps}
groups_per_step = {groups}
checkpoint_every = 5
stall_timeout_s = 120.0
"""

AT_A_PUSH: Final = "rollout actor at a push"
KILLED: Final = {
    "rollout actor": "ray::RolloutActor",
    AT_A_PUSH: "ray::RolloutActor",
    "learner": "ray::LearnerActor",
    "buffer": "ray::ReplayActor",
}
"""Process titles, as Ray writes them."""
SERVER_FAULTS: Final = {
    "server refuses": "422",
    "server fails": "500",
    "server hangs": "hang",
    "server vanishes": "drop",
}
FAULTS: Final = (*KILLED, "driver", *SERVER_FAULTS)
SERVER_FAULT_S: Final = 4.0
STEPS_AFTER: Final = 3
"""A fault that comes later would have no step by which to tell what it cost."""
POLL_S: Final = 0.1


@dataclass(kw_only=True)
class Report:
    """What a run under faults came to.

    Attributes:
        lost: groups that the final model should have been trained on, by its steps, and was not.
        trained_twice: questions of one epoch that the resulting model was trained on more than once.
        without_progress_s: fault -> seconds from it to the first step that the run had not done before, one for each
            time: with what a resume does again.
        to_next_step_s: the same to the next finished step, one that is done again too.
        unplayed: faults that the run was too short for.
        step_s: median seconds from step to step.
    """

    steps: int = 0
    starts: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    trained_twice: int = 0
    accounting: dict[str, object] = field(default_factory=dict)
    step_s: float = 0.0
    without_progress_s: dict[str, list[float]] = field(default_factory=dict)
    to_next_step_s: dict[str, list[float]] = field(default_factory=dict)
    unplayed: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True)
class Felt:
    """A fault that the run has not got over yet.

    Attributes:
        at: when it came.
        start: of the command, from which on a step counts.
        most_steps: that the run had done before it.
    """

    fault: str
    at: float
    start: int
    most_steps: int


class SearchServer:
    """BM25 behind `/retrieve` on loopback, which does what `mood` says: answer, or one of `SERVER_FAULTS`."""

    def __init__(self, index: Path) -> None:
        self.mood = "answer"
        self._retriever = BM25Retriever(index)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                mood = server.mood
                if mood == "hang":
                    time.sleep(SERVER_FAULT_S)
                if mood in ("hang", "drop"):
                    self.close_connection = True
                elif mood == "answer":
                    found = [server.search(query, body.get("topk") or 3) for query in body["queries"]]
                    self._send(200, {"result": found})
                else:
                    self._send(int(mood), {"detail": "on purpose"})

            def _send(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def search(self, query: str, top_k: int) -> list[dict[str, object]]:
        return [_document(passage) for passage in asyncio.run(self._retriever.search(query, top_k=top_k))]

    @contextmanager
    def running(self) -> Iterator[SearchServer]:
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()


def _document(passage: Passage) -> dict[str, object]:
    return {"document": {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}, "score": passage.score}


def make_parts(folder: Path) -> None:
    """World, index and a tiny model that has learnt the format, made once."""
    if (folder / "model").exists():
        return
    files = write_world("synthetic", folder / "world", seed=1, size=SIZE)
    build_bm25(files.corpus, folder / "index")
    make_tiny_model(world_texts(files.folder), folder / "untrained", seed=1, width=32, num_layers=2, feed_forward=64)
    warm_start(
        folder / "untrained",
        demonstrations=files.demonstrations,
        out=folder / "model",
        learning_rate=5e-3,
        batch_size=16,
        epochs=1,
        threads=2,
    )


class Chaos:
    """One run, hurt by `faults` in random order at random moments, begun again after each end until it is finished."""

    ending = frozenset({"learner", "buffer", "driver"})
    """What ends the command. A step that was under way may still be told after it, and is no sign of life."""

    def __init__(self, folder: Path, *, steps: int, faults: Sequence[str], seed: int, timeout_s: float) -> None:
        self.report = Report()
        self._folder = folder
        self._run = folder / "run"
        self._steps = steps
        self._rng = random.Random(seed)
        self._faults = list(faults)
        self._rng.shuffle(self._faults)
        self._deadline = time.monotonic() + timeout_s
        self._step_times: list[float] = []
        self._stuck: list[Felt] = []
        self._behind: list[Felt] = []
        self._most_steps = 0

    def play(self) -> Report:
        """Run to the last step.

        Raises:
            RuntimeError: it did not get there in time, or ended with a status that no fault explains.
        """
        began = time.monotonic()
        server = SearchServer(self._folder / "index")
        with server.running():
            recipe = self._folder / "chaos.toml"
            recipe.write_text(
                RECIPE.format(folder=self._folder, url=server.url, steps=self._steps, groups=GROUPS_PER_STEP)
            )
            words = ["train", str(recipe), "--run-dir", str(self._run), *self._words()]
            while not self._is_finished():
                self.report.starts += 1
                self._start(words, server)
                words = ["train", "--run-dir", str(self._run), "--set", f"retriever.url={server.url}"]
        self.report.seconds = round(time.monotonic() - began, 1)
        self._write_books()
        return self.report

    def _words(self) -> list[str]:
        """Settings beside those of the recipe."""
        return []

    def _is_finished(self) -> bool:
        record = self._run / "run.json"
        return record.exists() and json.loads(record.read_text())["status"] == "finished"

    def _start(self, words: list[str], server: SearchServer) -> None:
        log = (self._folder / f"start-{self.report.starts}.log").open("w")
        command = [sys.executable, "-m", "rexrag", *words]
        with log, subprocess.Popen(command, stdout=log, stderr=log, env=self._environment()) as process:
            try:
                self._hurt_now_and_then(process, server)
            finally:
                server.mood = "answer"
                _kill_tree(process.pid)
        if process.returncode == 2:
            raise RuntimeError(f"the run was refused: {(self._folder / log.name).read_text()[-2000:]}")

    def _environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def _hurt_now_and_then(self, process: subprocess.Popen[bytes], server: SearchServer) -> None:
        """One fault after another, each some steps after the one before."""
        due = self._num_steps() + self._rng.randint(1, 3)
        while process.poll() is None:
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"not finished in time: {self._num_steps()} of {self._steps} steps")
            self._look()
            if self._faults and due <= self._num_steps() <= self._steps - STEPS_AFTER:
                # A line of metrics.jsonl is written as the push of its step begins.
                if self._faults[-1] != AT_A_PUSH:
                    time.sleep(self._rng.uniform(0.0, 1.5))
                    if self._num_steps() > self._steps - STEPS_AFTER:
                        continue
                self._hurt_once(self._faults.pop(), process, server)
                due = self._num_steps() + self._rng.randint(2, 4)
            time.sleep(POLL_S)
        self._look()

    def _hurt_once(self, fault: str, process: subprocess.Popen[bytes], server: SearchServer) -> None:
        if not self._play_fault(fault, process, server):
            self._faults.insert(0, fault)
            return
        self.report.faults[fault] += 1
        self._look()
        start = self.report.starts + (fault in self.ending)
        felt = Felt(fault=fault, at=time.monotonic(), start=start, most_steps=self._most_steps)
        self._stuck.append(felt)
        self._behind.append(felt)

    def _play_fault(self, fault: str, process: subprocess.Popen[bytes], server: SearchServer) -> bool:
        """Whether there was somebody to hurt."""
        if fault in SERVER_FAULTS:
            server.mood = SERVER_FAULTS[fault]
            threading.Timer(SERVER_FAULT_S, lambda: setattr(server, "mood", "answer")).start()
        elif fault == "driver":
            _kill_tree(process.pid)
        else:
            victims = _children(self._root_pid(process), title=KILLED[fault])
            if not victims:
                return False
            self._rng.choice(victims).kill()
        return True

    def _root_pid(self, process: subprocess.Popen[bytes]) -> int:
        """The process below which the parts of the run are."""
        return process.pid

    def _num_steps(self) -> int:
        path = self._run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def _look(self) -> None:
        """Note when steps end; a resume takes some of them back."""
        self._keep_log()
        now, done = time.monotonic(), self._num_steps()
        for felt in self._behind:
            if felt.start > self.report.starts:
                felt.most_steps = max(felt.most_steps, done)
        if done > len(self._step_times):
            for felt in [one for one in self._stuck if one.start <= self.report.starts]:
                self.report.to_next_step_s.setdefault(felt.fault, []).append(round(now - felt.at, 1))
                self._stuck.remove(felt)
        for felt in [one for one in self._behind if one.start <= self.report.starts and done > one.most_steps]:
            self.report.without_progress_s.setdefault(felt.fault, []).append(round(now - felt.at, 1))
            self._behind.remove(felt)
        self._most_steps = max(self._most_steps, done)
        self._step_times = [*self._step_times[:done], *[now] * (done - len(self._step_times))]

    def _write_books(self) -> None:
        self._keep_log()
        trained = trained_groups(self._folder / "log")
        questions = Counter(trained.values())
        self.report.steps = self._num_steps()
        self.report.unplayed = Counter(self._faults)
        self.report.accounting = json.loads((self._run / "accounting.json").read_text())
        self.report.trained_twice = sum(count - 1 for count in questions.values())
        self.report.lost = self._steps * GROUPS_PER_STEP - len(trained)
        gaps = [b - a for a, b in zip(self._step_times, self._step_times[1:], strict=False)]
        self.report.step_s = round(statistics.median(gaps), 2) if gaps else 0.0

    def _keep_log(self) -> None:
        """Have a second name for each segment of the replay log: the run deletes those that it needs no more."""
        kept = self._folder / "log"
        kept.mkdir(exist_ok=True)
        for segment in segments(self._run / "buffer"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                (kept / segment.name).hardlink_to(segment)


def trained_groups(log: Path) -> dict[str, tuple[int, str]]:
    """Group -> (epoch, question), of the groups that the final model was trained on, by the log.

    A start that resumed at step s voids what was trained on after s.
    """
    questions: dict[str, tuple[int, str]] = {}
    steps: dict[int, tuple[str, ...]] = {}
    for record in read_log(log):
        if isinstance(record, Begin):
            steps = {step: groups for step, groups in steps.items() if step <= record.resume_step}
        elif isinstance(record, Finish):
            questions[record.group_id] = (record.epoch, record.question)
        elif isinstance(record, Outcome):
            steps[record.step] = record.groups
    return {group: questions[group] for groups in steps.values() for group in groups}


def _children(pid: int, *, title: str) -> list[psutil.Process]:
    return [one for one in _tree(pid) if _has_title(one, title)]


def _has_title(process: psutil.Process, title: str) -> bool:
    try:
        return title in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill_tree(pid: int) -> None:
    """Kill -9 of a process and of all that it has started."""
    below = _tree(pid)
    for kill in (lambda: os.kill(pid, signal.SIGKILL), *(_killer(one) for one in below)):
        try:
            kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


def _killer(process: psutil.Process) -> Callable[[], None]:
    return lambda: process.kill()


def play(folder: Path, *, steps: int, faults: Sequence[str], seed: int = 0, timeout_s: float = 3600.0) -> Report:
    """Make the parts, play, and report."""
    folder.mkdir(parents=True, exist_ok=True)
    make_parts(folder)
    return Chaos(folder, steps=steps, faults=faults, seed=seed, timeout_s=timeout_s).play()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3, help="how often each fault happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/chaos"), help="folder of the run; must be new")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the report")
    asked = parser.parse_args()
    if asked.out is not None and not asked.out.parent.is_dir():
        parser.error(f"--out {asked.out}: its folder does not exist")
    began_at = commit()
    report = play(asked.work.resolve(), steps=asked.steps, faults=FAULTS * asked.rounds, seed=asked.seed)
    text = text_of(report, began_at=began_at)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


def text_of(report: Report, *, began_at: str) -> str:
    """The report as JSON, with the machine that it is from and the commit that the run began at."""
    return json.dumps({"machine": machine(), "commit": began_at, **vars(report)}, indent=1)


if __name__ == "__main__":
    main()
