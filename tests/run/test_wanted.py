from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from rexrag.config import Config
from rexrag.reporting.terminal import Progress
from rexrag.run.plan import open_run, plan_run
from rexrag.run.signals import StopSignal
from rexrag.run.train import _layout
from rexrag.run.wanted import note_wanted, with_wanted
from rexrag.run_folder import RunFolder


def config_of(num_actors: int | None) -> Config:
    return Config.model_validate({"rollout": {"num_actors": num_actors}})


@pytest.mark.parametrize("before", [None, 2])
def test_what_was_asked_for_last_counts_until_the_recipe_says_otherwise(tmp_path: Path, before: int | None) -> None:
    run, config = RunFolder(tmp_path), config_of(before)
    assert with_wanted(run, config) == config
    note_wanted(run, config, 8)
    note_wanted(run, config, 5)
    assert with_wanted(run, config) == config_of(5)
    assert with_wanted(run, config_of(3)) == config_of(3), "set anew since"
    note_wanted(run, config_of(3), 4)
    assert with_wanted(run, config_of(3)) == config_of(4)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"num_actors": "8", "instead_of": 2}', '{"num_actors": 0, "instead_of": 2}']
)
def test_a_damaged_file_changes_nothing(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    run.wanted.write_text(text)
    assert with_wanted(run, config_of(2)) == config_of(2)


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "gone")
    note_wanted(run, config_of(2), 8)
    assert "wanted.json" in caplog.text


def test_a_resume_begins_with_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[prepare]\nworld = "synthetic"\nmodel = "tiny"\nindex = "bm25"\nwarmstart = true\n')
    for words, wanted in (((), 2), ((), 7), (("rollout.num_actors=3",), 3)):
        overrides = ["rollout.num_actors=2", *words]
        with open_run(plan_run(recipe, overrides=overrides, run_dir=tmp_path / "run", resume="auto")) as request:
            layout = _layout(request, inputs=cast("Any", None), stop=StopSignal(), progress=Progress())
            assert layout.num_actors == wanted
            note_wanted(request.run, request.config, 7)
