from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import rexrag.run.train
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


def test_what_was_asked_for_and_no_longer_fits_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[prepare]\nworld = "synthetic"\nmodel = "tiny"\nindex = "bm25"\nwarmstart = true\n')
    plan = plan_run(recipe, overrides=["rollout.num_gpus=1"], run_dir=tmp_path / "run", resume="auto")
    with open_run(plan) as request:
        note_wanted(request.run, request.config, 7)
        layout = _layout(request, inputs=cast("Any", None), stop=StopSignal(), progress=Progress())
    assert layout.num_actors == 1
    assert "what rexrag scale asked for last does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "asked"), [("owner/name", False), ("/models/mine", True)])
def test_nodes_are_asked_for_a_model_folder_not_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, asked: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(rexrag.run.train, "wait_for_layout", lambda *_, **__: None)
    seen: dict[str, Path] = {}
    monkeypatch.setattr(rexrag.run.train, "probe_paths", lambda paths, *, writable: seen.update(paths) is None)
    request = SimpleNamespace(run=RunFolder(tmp_path), config=config_of(1))
    inputs = SimpleNamespace(model_path=model)
    _layout(cast("Any", request), inputs=cast("Any", inputs), stop=StopSignal(), progress=Progress())
    assert ("model.path" in seen) == asked


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
