"""`rexrag submit` against a real head with a job server and token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from free_ports import free_ports
from ray_heads import end_with_children
from system_runs import TIMEOUT_S, assert_books_balance, read_lines

from rexrag.run.control_actor import run_name

pytestmark = pytest.mark.system


def wait_for_job_server(head: subprocess.Popen[bytes], *, address: str, token: str, log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 300
    while True:
        assert head.poll() is None, f"the head ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no job server at {address}:\n{log.read_text()}"
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10):
            return
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head of its own on free ports; gives the environment of its users."""
    tmp_path = tmp_path_factory.mktemp("cluster")
    folder = tempfile.mkdtemp(prefix="rexrag-", dir="/tmp")  # paths of sockets are limited to 107 characters
    token = secrets.token_hex(32)
    (tmp_path / "token").write_text(token)
    dashboard, agent, agent_grpc, client = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    words = [
        *("ray", "start", "--head", "--block", "--num-cpus=2", "--port=0", f"--temp-dir={folder}"),
        *("--include-dashboard=true", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}"),
        *("--node-ip-address=127.0.0.1", "--object-store-memory=200000000"),
    ]
    log = tmp_path / "head.log"
    address = f"http://127.0.0.1:{dashboard}"
    with log.open("wb") as out:
        head = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for_job_server(head, address=address, token=token, log=log)
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        end_with_children(head)
        shutil.rmtree(folder, ignore_errors=True)


def submit(*words: str | Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`rexrag submit WORDS --follow`, from a folder that is not the checkout."""
    command = [sys.executable, "-m", "rexrag", "submit", *map(str, words), "--follow"]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=600)


def test_a_job_is_watched_stopped_and_found_again_over_the_cluster(
    recipe: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "first"
    settings = (
        "train.checkpoint_every=500",
        "eval.every=0",
        "eval.max_questions=2",
        "rollout.threads_per_actor=1",
    )
    words = ["--run-dir", str(run), *(word for setting in settings for word in ("--set", setting))]
    long = [*words, "--set", "train.steps=100000"]

    def control(*asked: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rexrag", *asked, "--run", str(run)]
        return subprocess.run(command, env=cluster, cwd="/", capture_output=True, text=True, timeout=TIMEOUT_S)

    with ThreadPoolExecutor(1) as background:
        job = background.submit(submit, recipe, *long, environment=cluster)
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists():
            assert not job.done(), job.result()
            assert time.monotonic() < deadline, "no step in 300 s"
            time.sleep(0.2)
        second = submit(recipe, *long, environment=cluster)
        assert second.returncode == 2
        assert "goes on already" in second.stderr
        told = control("status")
        assert "rollout-0" in told.stdout, told.stderr
        told = control("status", "--address", cluster["RAY_ADDRESS"])
        assert "rollout-0" in told.stdout, told.stdout + told.stderr
        subprocess.run(
            ["ray", "job", "stop", run_name(run)], env=cluster, check=True, capture_output=True, timeout=TIMEOUT_S
        )
        done = job.result(timeout=TIMEOUT_S)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "submitted" in done.stdout
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["steps"] == len(read_lines(run / "metrics.jsonl"))
    assert (run / "checkpoints" / f"step-{record['steps']:06d}" / "COMMIT").exists()
    assert_books_balance(run)

    again = submit(recipe, *words, "--set", f"train.steps={record['steps'] + 1}", environment=cluster)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, record["steps"] + 2))
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert_books_balance(run)
    other = submit(recipe, *words, "--set", "train.seed=7", environment=cluster)
    assert other.returncode == 2, "the status of the job's own command: " + other.stdout + other.stderr
    assert "train.seed = 7" in other.stdout


@pytest.mark.parametrize("words", [["--run-dir", "runs/first"], ["--run-dir=first"]])
def test_a_run_folder_that_would_not_last_is_refused(words: list[str]) -> None:
    done = submit("/recipe.toml", *words, environment=dict(os.environ))
    assert done.returncode == 2
    assert "must be an absolute path" in done.stderr


def test_a_recipe_that_is_not_here_is_refused() -> None:
    done = submit("absent.toml", "--run-dir", "/runs/first", environment=dict(os.environ))
    assert done.returncode == 2
    assert "RECIPE = absent.toml: no such file" in done.stderr


def test_a_job_server_that_is_not_there_is_told(recipe: Path) -> None:
    words = (recipe, "--run-dir", "/runs/first", "--address")
    done = submit(*words, "http://127.0.0.1:1", environment=dict(os.environ))
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert submit(*words, "127.0.0.1:6379", environment=dict(os.environ)).returncode == 2
