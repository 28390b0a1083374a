"""A small world with a tiny model that has learnt the format, made once for all runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from system_runs import small_world


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file over the world; paths in it are absolute."""
    return small_world(tmp_path_factory.mktemp("small"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs take their time, more of it where other work is going on: they have bounds of their own."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
