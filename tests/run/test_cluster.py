from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from rexrag.errors import ConfigError, RunFailure
from rexrag.run import cluster, train
from rexrag.run.cluster import check_form, check_reachable


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "https://head"])
def test_the_address_of_a_job_server_is_told_from_a_clusters(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_form(address)
    assert f"RAY_ADDRESS = {address}: is where jobs are submitted to" in str(caught.value)
    assert "RAY_ADDRESS=10.0.0.1:6379" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["head", "10.0.0.1:", ":6379", "head:port", "head:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        check_form(address)


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"RAY_ADDRESS = {address}: cannot be reached \(Connection refused\)"):
            check_reachable(address)


def test_an_address_that_does_not_answer_is_waited_for_no_longer_than_its_bound() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            started = time.monotonic()
            with pytest.raises(ConfigError, match=r"no answer within 0\.3 s"):
                check_reachable(f"127.0.0.1:{full.getsockname()[1]}", timeout_s=0.3)
            assert time.monotonic() - started < 5


@contextmanager
def silent() -> Iterator[int]:
    """The port of a server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def plain_http() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("make", [silent, plain_http])
def test_what_listens_and_is_no_ray_is_told_within_a_bound(make: Callable[[], AbstractContextManager[int]]) -> None:
    with make() as port:
        address = f"127.0.0.1:{port}"
        started = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            check_reachable(address, join_timeout_s=4.0)
        assert time.monotonic() - started < 20
    assert f"RAY_ADDRESS = {address}: no Ray cluster could be joined there (no answer within 4 s)" in str(caught.value)
    assert "is a Ray head running there" in str(caught.value)
    assert "unset it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_ray_says_against_joining_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_TRIAL", "print('Version mismatch.\\nMore of it'); raise SystemExit(1)")
    with silent() as port, pytest.raises(ConfigError, match=r"could be joined there \(Version mismatch\); is a Ray"):
        check_reachable(f"127.0.0.1:{port}")


def test_a_trial_that_joins_lets_the_run_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_TRIAL", "import os, sys; sys.exit('RAY_JOB_CONFIG_JSON_ENV_VAR' in os.environ)")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    check_reachable("auto")


@pytest.mark.system
@pytest.mark.timeout(120)
def test_a_cluster_is_joined(ray_session: None) -> None:
    check_reachable(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("10.0.0.1:6379", r"RAY_ADDRESS = 10\.0\.0\.1:6379: no Ray cluster .* \(timed out during startup\.?\)"),
        (None, r"Ray could not be started on this machine \(timed out during startup\.?\)"),
    ],
)
def test_a_ray_that_does_not_start_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, told: str
) -> None:
    def fail(**_: object) -> None:
        raise Exception("timed out during startup.\nAnd much more")  # as Ray does

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(train, "cluster_address", lambda: address)
    with pytest.raises(RunFailure, match=told), train._ray():
        pass


def test_a_ray_of_its_own_is_not_looked_for() -> None:
    for address in (None, "local"):
        check_reachable(address, join_timeout_s=0.0)
