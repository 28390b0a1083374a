from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
from hypothesis import HealthCheck, settings

from rexrag.processes import give_way

give_way()
# What Ray takes it for when it is imported. Commands that are called in this process would set it where the user has a
# token, and a Ray that is started after them would want one.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

# The same examples each time where a failure must be one of the change; elsewhere new ones are tried. An example may
# take long where the machine is busy.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: where files are shared out, the last ones should be short."""
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A small Ray on this machine, shared by all tests that need one."""
    # Without an address it would join a Ray that runs, or once ran, on this machine.
    for is_last in (False, False, True):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
            break
        except Exception as error:  # Ray knows no kind of its own for it
            if is_last or "timed out during startup" not in str(error):  # after 30 s, which a busy machine may need
                raise
            ray.shutdown()
    yield
    ray.shutdown()
