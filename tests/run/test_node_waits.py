"""Waiting for the nodes of a cluster."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import rexrag.run.nodes as nodes_module
from rexrag.config import Config
from rexrag.errors import ConfigError, Interrupted
from rexrag.processes import Resources
from rexrag.recipe import flatten, make_config
from rexrag.reporting.terminal import Progress
from rexrag.run.nodes import probe_paths, wait_for_layout
from rexrag.run.signals import StopSignal

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
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_node_that_went_before_it_was_asked_is_no_problem_of_the_files(
    is_gone: bool, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = nodes_module._nodes()
    lost: Resources = {"CPU": 1.0}
    listed = [*here, (("0" * 56, "lost (192.0.2.7)"), lost)]
    answers = iter([listed, here if is_gone else listed])
    monkeypatch.setattr(nodes_module, "_nodes", lambda: next(answers))
    with caplog.at_level(logging.WARNING, logger="rexrag"):
        if is_gone:
            probe_paths({"model.path": tmp_path}, writable=tmp_path)
            assert "node lost (192.0.2.7) is gone" in caplog.text
        else:
            with pytest.raises(ConfigError, match=r"node lost \(192\.0\.2\.7\): cannot be asked"):
                probe_paths({"model.path": tmp_path}, writable=tmp_path)
