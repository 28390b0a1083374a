"""Waiting for the nodes of a cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import rexrag.run.nodes as nodes_module
from rexrag.config import Config
from rexrag.errors import ConfigError, Interrupted, RunFailure
from rexrag.recipe import flatten, make_config
from rexrag.reporting.terminal import Progress
from rexrag.run import train
from rexrag.run.nodes import probe_paths, wait_for_layout
from rexrag.run.signals import StopSignal
from rexrag.run_folder import RunFolder

Bundles = Sequence[dict[str, float]]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_that_gives_up_leaves_no_node_asked_for(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Bundles] = []
    stop = StopSignal()

    def ask(bundles: Bundles) -> None:
        asked.append(bundles)
        if is_stopped:
            stop.be_graceful()
            stop.ask("a test")

    monkeypatch.setattr(nodes_module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(nodes_module, "cluster_nodes", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(nodes_module, "_ask_autoscaler", ask)
    config = make_config({**flatten(Config()), "learner.threads": 4, "train.stall_timeout_s": 0.1}, sources={})
    began = time.monotonic()
    with Progress() as progress, pytest.raises(Interrupted if is_stopped else ConfigError):
        wait_for_layout(config, progress=progress, stop=stop)
    assert time.monotonic() - began < 60
    assert asked[0]
    assert asked[-1] == []


@pytest.mark.system
def test_a_node_that_went_before_it_was_asked_changes_the_plan_and_is_no_problem_of_the_files(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, lost = nodes_module._nodes(), (("0" * 56, "lost (192.0.2.7)"), dict[str, float]({"CPU": 1.0}))
    paths = {"model.path": tmp_path}
    answers = iter([[*here, lost], here, here])
    monkeypatch.setattr(nodes_module, "_nodes", lambda: next(answers))
    with caplog.at_level(logging.WARNING, logger="rexrag"):
        assert not probe_paths(paths, writable=tmp_path)
    assert "a node is gone before it was asked" in caplog.text
    assert "lost (192.0.2.7)" in caplog.text
    assert probe_paths(paths, writable=tmp_path)
    monkeypatch.setattr(nodes_module, "_nodes", lambda: [*here, lost])
    with pytest.raises(RunFailure, match=r"do not say whether they see .* lost \(192\.0\.2\.7\) .* give the command"):
        probe_paths(paths, writable=tmp_path)


def test_a_run_is_planned_again_where_a_node_went_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, all_there = iter(["with the node", "without it"]), iter([False, True])
    monkeypatch.setattr(train, "cluster_address", lambda: "192.0.2.1:6379")
    monkeypatch.setattr(train, "wait_for_layout", lambda *_, **__: next(plans))
    monkeypatch.setattr(train, "probe_paths", lambda *_, **__: next(all_there))
    request = SimpleNamespace(run=RunFolder(tmp_path), config=Config())
    layout = train._layout(
        cast("Any", request),
        inputs=cast("Any", SimpleNamespace(model_path=str(tmp_path))),
        stop=StopSignal(),
        progress=Progress(),
    )
    assert str(layout) == "without it"
