from __future__ import annotations

import socket
import time

import pytest

from rexrag.errors import ConfigError
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


def test_what_answers_or_needs_no_answer_is_left_to_ray() -> None:
    for address in (None, "auto", "local"):
        check_reachable(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
