"""From settings to parts: how cores and GPUs are shared, and that no setting is lost on the way."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rexrag.actors.build import RolloutSettings
from rexrag.actors.episode import EpisodeSettings
from rexrag.buffer.settings import ReplaySettings
from rexrag.config import TABLES, Config
from rexrag.engine.settings import EngineSettings
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings
from rexrag.recipe import flatten, make_config
from rexrag.retrieval.settings import RetrieverSettings, SearchActorSettings
from rexrag.run.controller import LoopSettings
from rexrag.run.part_settings import copied, learner_settings

EMPTY = inspect.Parameter.empty
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    RolloutSettings, EpisodeSettings, ReplaySettings, EngineSettings, CorrectionSettings, LossSettings,
    ProbeSettings, OptimizerSettings, LearnerSettings, LoopSettings, RetrieverSettings, SearchActorSettings,
)  # fmt: skip


def config_with(**settings: object) -> Config:
    return make_config({**flatten(Config()), **{k.replace("__", "."): v for k, v in settings.items()}}, sources={})


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_a_default_stands_in_one_place(settings: type) -> None:
    """In `rexrag.config`: a part whose setting was forgotten fails in place of running with a value of its own."""
    required = {
        name for name, parameter in inspect.signature(settings).parameters.items() if parameter.default is EMPTY
    }
    assert required == {field.name for field in fields(settings)}


def test_every_setting_is_read() -> None:
    """Each key is copied by its name into a part's settings, or named where settings are read."""
    read = _attributes_read()
    by_name = {field.name for settings in SETTINGS for field in fields(settings)}
    config = Config()
    unread = [
        f"{table}.{name}"
        for table in TABLES
        for name in type(getattr(config, table)).model_fields
        if name not in read | by_name
    ]
    assert not unread


def test_a_field_that_is_left_out_is_told() -> None:
    with pytest.raises(TypeError, match="segment_bytes"):
        copied(ReplaySettings, Config().replay, folder=Path(), questions=(), groups_per_step=1, num_steps=1, seed=0)


def test_sections_are_copied_whole() -> None:
    changes = {"correction__cap": 3.5, "loss__preserve": 0.25, "optimizer__beta1": 0.125, "learner__max_bad_steps": 7}
    made = learner_settings(config_with(**changes))
    assert (made.correction.cap, made.loss.preserve, made.optimizer.beta1, made.max_bad_steps) == (3.5, 0.25, 0.125, 7)


def test_the_learners_benchmark_measures_the_default_method() -> None:
    spec = importlib.util.spec_from_file_location("learner_benchmark", ROOT / "benchmarks" / "learner.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec.loader.exec_module(benchmark)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    wanted = learner_settings(config_with(learner__autocast="bfloat16"))
    assert wanted == benchmark.SETTINGS


def _attributes_read() -> set[str]:
    """All names that stand after a dot in the modules that read settings."""
    folders = ("run", "preparation")
    files = [*(path for name in folders for path in (ROOT / "rexrag" / name).glob("*.py"))]
    files += [ROOT / "rexrag" / name for name in ("recipe.py", "commands/standalone.py")]
    return {
        node.attr
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
