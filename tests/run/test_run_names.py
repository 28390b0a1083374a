"""What a run is called on its cluster."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from rexrag.run.control_actor import is_short_for, run_name


def test_a_plain_folder_is_its_name() -> None:
    assert run_name(Path("/shared/runs/first_2")) == "rexrag-shared-runs-first_2"


def test_two_folders_never_have_one_name() -> None:
    folders = ("/s/runs/grpo/1", "/s/runs/grpo-1", "/s/runs/v1.5", "/s/runs/v1-5", "/s/runs/日", "/s/runs/月")
    names = [run_name(Path(folder)) for folder in folders]
    assert all(one != other for one, other in combinations(names, 2))
    assert all(name.isascii() for name in names)


@pytest.mark.parametrize("folder", ["/s/runs/first", "/s/runs/first-1", "/s/runs/a b"])
def test_the_end_of_a_folder_names_its_run(folder: str) -> None:
    path = Path(folder)
    short = path.name.replace(" ", "-")
    assert is_short_for(short, run_name(path))
    assert not is_short_for(f"x{short}", run_name(path))


def test_a_folder_above_a_runs_own_does_not_name_it() -> None:
    assert not is_short_for("sweep", run_name(Path("/shared/runs/sweep/seed_1")))
