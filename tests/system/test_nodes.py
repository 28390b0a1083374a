"""A run over several Ray nodes: it waits for nodes, takes in new ones, outlives their loss, and is resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_ports
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from ray_heads import end_with_children
from system_runs import TIMEOUT_S, Watch, assert_books_balance, read_lines

from rexrag.run.nodes import _missing

pytestmark = pytest.mark.system

SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""Ray takes fifteen seconds by itself until it counts a node as lost."""
SETTINGS = (
    "learner.resources={learner=1}",
    "rollout.resources={rollout=1}",
    "learner.threads=1",
    "rollout.threads_per_actor=1",
    "rollout.num_actors=2",
    "train.steps=100000",
    "train.checkpoint_every=2",
    "eval.every=0",
    "eval.max_questions=2",
)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that offers nothing, beside which a test puts its nodes."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SOON})
    yield made
    made.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def autoscaled(tmp_path: Path) -> Iterator[str]:
    """The address of a head without room, whose autoscaler starts a node for each part that asks for one.

    All of it is lost at the end.
    """
    folder = tempfile.mkdtemp(prefix="rexrag-", dir="/tmp")  # paths of sockets are limited to 107 characters
    port, client = free_ports(2)
    address = f"127.0.0.1:{port}"
    node = {"node_config": {}, "min_workers": 0}
    config = {
        "cluster_name": "scaled",
        "max_workers": 8,
        "idle_timeout_minutes": 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes have one
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "learner": {**node, "resources": {"CPU": 1, "learner": 1}, "max_workers": 1},
            "rollout": {**node, "resources": {"CPU": 1, "rollout": 1}, "max_workers": 2},
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{key: [] for key in ("initialization_commands", "setup_commands", "head_setup_commands")},
        **{key: [] for key in ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")},
    }
    (tmp_path / "scaled.json").write_text(json.dumps(config))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    words = [
        *("ray", "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--temp-dir={folder}"),
        *(f"--autoscaling-config={tmp_path / 'scaled.json'}", "--include-dashboard=false"),
        *(f"--ray-client-server-port={client}", "--node-ip-address=127.0.0.1", "--object-store-memory=200000000"),
    ]
    with (tmp_path / "head.log").open("wb") as out:
        head = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield address
    finally:
        end_with_children(head)
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """`rexrag train` on the cluster; `told` is what it has said."""

    def __init__(self, recipe: Path, run: Path, *settings: str, address: str) -> None:
        self.run = run
        self._environment = {**os.environ, "RAY_ADDRESS": address}
        self._watch = Watch(run, environment=self._environment)
        words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        self.process = self._start("train", str(recipe), "--run-dir", str(run), *words)
        self.told = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rexrag", *words]
        out = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, stdout=out, stderr=subprocess.STDOUT, text=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told += line

    def ask(self, *words: str) -> str:
        process = self._start(*words, "--run", str(self.run))
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        return out

    def until(self, is_so: Callable[[dict[str, Any]], bool], *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Wait until the run's status is so."""
        try:
            return self._watch.until(is_so, process=self.process, timeout_s=timeout_s)
        except AssertionError as error:
            error.add_note(self.told)
            raise

    def until_told(self, words: str) -> None:
        deadline = time.monotonic() + 300
        while words not in self.told:
            assert self.process.poll() is None, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.2)

    def ended(self, *, status: int) -> None:
        assert self.process.wait(timeout=300) == status, self.told
        self._reader.join(timeout=10)

    def kill(self) -> None:
        """Whatever it does; nothing where it has ended."""
        self.process.kill()
        self._watch.end()


def drain(node: Any, cluster: Cluster) -> None:  # noqa: ANN401
    """Tell a node that it will go, as a preemption does."""
    words = ("ray", "drain-node", "--address", cluster.address, "--node-id", node.node_id)
    why = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "600",
    )
    command = [str(Path(sys.executable).parent / words[0]), *words[1:], *why]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def states(status: dict[str, Any]) -> dict[str, str]:
    """How each actor is. Their numbers do not follow from the nodes: Ray may put one on a node that is just lost."""
    at_work = ("healthy", "stale", "suspect")
    return {a["actor_id"]: "at work" if a["state"] in at_work else a["state"] for a in status["actors"]}


def how_many(status: dict[str, Any]) -> Counter[str]:
    return Counter(states(status).values())


def test_a_run_takes_in_nodes_outlives_their_loss_and_is_resumed(
    recipe: Path, tmp_path: Path, cluster: Cluster
) -> None:
    run = tmp_path / "run"
    learner_node = cluster.add_node(num_cpus=1, resources={"learner": 1})
    job = Job(recipe, run, address=cluster.address)
    again: Job | None = None
    try:
        job.until_told("waiting for nodes: no node of the cluster has room for the learner")
        assert "and beside it a rollout actor (1 CPU, 1 rollout)" in " ".join(job.told.split())
        cluster.add_node(num_cpus=1, resources={"rollout": 1})

        began = job.until(lambda status: status["step"] >= 2)
        assert how_many(began) == {"at work": 1, "starting": 1}, "it begins with what has room"
        stays = next(actor_id for actor_id, state in states(began).items() if state == "at work")

        second = cluster.add_node(num_cpus=1, resources={"rollout": 1})
        two = states(job.until(lambda status: how_many(status) == {"at work": 2}))

        third = cluster.add_node(num_cpus=1, resources={"rollout": 1})
        drain(second, cluster)
        moved = states(job.until(lambda status: how_many(status) == {"at work": 2} and states(status) != two))
        cluster.remove_node(second)

        cluster.remove_node(third, allow_graceful=False)
        lost = job.until(lambda status: how_many(status) == {"at work": 1, "starting": 1})
        assert states(lost).keys() & moved.keys() == {stays}
        job.until(lambda status: status["step"] > lost["step"] + 1)

        cluster.remove_node(learner_node, allow_graceful=False)
        job.ended(status=1)
        assert "its process died" in job.told
        done = len(read_lines(run / "metrics.jsonl"))

        ranks = [cluster.add_node(num_cpus=1, resources={"learner": 1}) for _ in range(2)]
        again = Job(recipe, run, "learner.num_ranks=2", address=cluster.address)
        again.until(lambda status: status["step"] > done)
        drain(ranks[1], cluster)
        again.ended(status=130)
        assert "stopped by its learner's node, which will go" in again.told
    finally:
        job.kill()
        if again is not None:
            again.kill()
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    dropped = assert_books_balance(run)["dropped"]
    assert isinstance(dropped, dict)
    assert dropped.keys() <= {"lost"}, "only what came after the checkpoint is asked again"


def test_a_node_says_which_files_it_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    paths = {"model.path": str(tmp_path / "model"), "retriever.path": str(tmp_path / "index")}
    assert _missing(paths, str(tmp_path)) == [f"retriever.path = {tmp_path / 'index'}: is not there"]
    assert "cannot be written to" in _missing({}, str(tmp_path / "absent"))[0]


@pytest.mark.slow
def test_an_autoscaler_brings_nodes_and_a_run_outlives_the_whole_cluster(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run and its scaling ask for nodes and get them; the head is lost with all nodes, a new cluster goes on."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a driver waits a minute by itself
    run = tmp_path / "run"
    settings = ("rollout.num_actors=1", "train.keep_checkpoints=1")
    with autoscaled(tmp_path) as address:
        job = Job(recipe, run, *settings, address=address)
        job.until_told("waiting for nodes: no node of the cluster has room for the learner")
        job.until(lambda status: status["step"] >= 1 and how_many(status) == {"at work": 1})
        job.ask("scale", "--actors", "2")
        two = job.until(lambda status: how_many(status) == {"at work": 2})
        done = job.until(lambda status: status["step"] >= two["step"] + 3)["step"]
    assert job.process.wait(timeout=120) != 0, job.told
    job.kill()
    with autoscaled(tmp_path) as address:
        again = Job(recipe, run, *settings, address=address)
        try:
            gone_on = again.until(lambda status: status["step"] > done)
            assert gone_on["num_wanted"] == 2, "as was asked for"
            again.ask("scale", "--actors", "1", "--now")
            one = again.until(lambda status: len(states(status)) == 1 and status["step"] > gone_on["step"] + 4)
            again.ask("scale", "--actors", "2")
            joined = again.until(lambda status: how_many(status) == {"at work": 2})
            new = states(joined).keys() - states(one).keys()
            assert len(new) == 1
            assert not new & states(gone_on).keys(), "it was built from a checkpoint that others have followed since"
            again.ask("stop")
            again.ended(status=130)
        finally:
            again.kill()
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "each step once"
    assert_books_balance(run)
