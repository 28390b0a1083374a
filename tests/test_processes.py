"""Work in a process of its own: result, states, errors and death reach the parent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rexrag.errors import ConfigError, RunFailure
from rexrag.processes import memory_bytes, num_cores, run_in_child


def counts(*, progress: Callable[[int], None]) -> str:
    progress(1)
    progress(2)
    return os.environ.get("REXRAG_TEST_CHILD", "") + str(os.getpid())


def is_misled(*, progress: Callable[[int], None]) -> None:
    raise ConfigError("no such file")


def fails(*, progress: Callable[[int], None]) -> None:
    raise RunFailure("the warm start diverged")


def breaks(*, progress: Callable[[int], None]) -> None:
    raise ZeroDivisionError("1 / 0")


def dies(*, progress: Callable[[int], None]) -> None:
    os._exit(7)


def waits(*, progress: Callable[[str], None], scratch: Path) -> None:
    scratch.touch()
    try:
        progress("waiting")
        time.sleep(60)
    finally:
        scratch.unlink()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_that_affinity_and_container_leave(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("files", "bound"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1000000\n"}, 1_000_000),
        ({"memory/memory.limit_in_bytes": "2000000\n"}, 2_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_memory_is_what_the_container_leaves(files: dict[str, str], bound: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_bytes(tmp_path) == (bound or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def test_result_and_states_arrive_and_the_environment_is_the_childs_alone() -> None:
    states: list[int] = []
    result = run_in_child(counts, name="counting", environment={"REXRAG_TEST_CHILD": "here "}, progress=states.append)
    assert states == [1, 2]
    word, pid = result.split()
    assert word == "here"
    assert int(pid) != os.getpid()
    assert "REXRAG_TEST_CHILD" not in os.environ


def test_a_users_mistake_arrives_as_it_is() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        run_in_child(is_misled, name="reading", environment={}, progress=print)


def test_a_failure_that_says_why_arrives_as_it_is() -> None:
    with pytest.raises(RunFailure, match=r"^the warm start diverged$"):
        run_in_child(fails, name="the warm start", environment={}, progress=print)


def test_a_parent_that_is_stopped_lets_the_child_tidy_up(tmp_path: Path) -> None:
    def stop(_: str) -> None:
        assert (tmp_path / "scratch").exists()
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_child(partial(waits, scratch=tmp_path / "scratch"), name="waiting", environment={}, progress=stop)
    assert not (tmp_path / "scratch").exists()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("work", "words"), [(breaks, "dividing broke: ZeroDivisionError"), (dies, "exit code 7")])
def test_a_child_that_breaks_or_dies_ends_in_a_run_failure(work: Callable[..., None], words: str) -> None:
    with pytest.raises(RunFailure, match=words):
        run_in_child(work, name="dividing", environment={}, progress=print)
