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
from rexrag.errors import ConfigError
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings
from rexrag.recipe import flatten, make_config
from rexrag.retrieval.settings import RetrieverSettings, SearchActorSettings
from rexrag.run.controller import LoopSettings
from rexrag.run.part_settings import copied, describe_layout, device_of, learner_settings, plan_layout

EMPTY = inspect.Parameter.empty
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    RolloutSettings, EpisodeSettings, ReplaySettings, EngineSettings, CorrectionSettings, LossSettings,
    ProbeSettings, OptimizerSettings, LearnerSettings, LoopSettings, RetrieverSettings, SearchActorSettings,
)  # fmt: skip


def config_with(**settings: object) -> Config:
    return make_config({**flatten(Config()), **{k.replace("__", "."): v for k, v in settings.items()}}, sources={})


@pytest.mark.parametrize(
    ("settings", "num_gpus", "num_actors", "learner_gpus"),
    [
        ({}, 0, 4, 0.0),
        ({}, 1, 4, 1.0),
        ({"learner__num_gpus": 0.0}, 1, 4, 0.0),
        ({"rollout__num_gpus": 0.5}, 1, 1, 0.5),
        ({"rollout__num_gpus": 0.75}, 4, 3, 1.0),
        ({"rollout__num_gpus": 1.0}, 2, 1, 1.0),
        ({"rollout__num_gpus": 1.0}, 8, 7, 1.0),
        ({"rollout__num_gpus": 0.5}, 8, 14, 1.0),
        ({"rollout__num_gpus": 0.25, "learner__num_gpus": 0.5}, 2, 6, 0.5),
        ({"rollout__num_gpus": 1.0, "learner__num_gpus": 0.0}, 1, 1, 0.0),
        ({"rollout__num_gpus": 1.0, "rollout__num_actors": 3}, 4, 3, 1.0),
        ({"rollout__num_gpus": 0.2, "rollout__num_actors": 4, "learner__num_gpus": 0.1}, 1, 4, 0.1),
    ],
)
def test_gpus_are_shared(settings: dict[str, object], num_gpus: float, num_actors: int, learner_gpus: float) -> None:
    layout = plan_layout(config_with(**settings), num_cores=8, node_cores=8, num_gpus=num_gpus)
    assert layout.num_actors == num_actors
    assert layout.learner_gpus == pytest.approx(learner_gpus)
    assert device_of(layout.learner_gpus) == ("cuda" if learner_gpus else "cpu")


def test_the_shares_are_told_in_words() -> None:
    layout = plan_layout(config_with(rollout__num_gpus=0.5), num_cores=2, node_cores=2, num_gpus=1)
    assert describe_layout(layout) == [
        "1 rollout actor: 2 threads each, 0.5 of a GPU, 12 groups at once",
        "learner: 2 threads, 0.5 of a GPU",
    ]


def test_a_pool_of_search_actors_has_its_share_first() -> None:
    pool = {"retriever__kind": "ray", "retriever__num_actors": 2}
    layout = plan_layout(config_with(**pool, retriever__num_cpus=2.0), num_cores=8, node_cores=8, num_gpus=0)
    assert (layout.num_searchers, layout.searcher_cpus, layout.searcher_gpus) == (2, 2.0, 0.0)
    assert layout.num_actors == 2, "one for two of the cores that are left"
    assert layout.cpus_per_process == 1.0
    assert describe_layout(layout)[0] == "2 search actors: 2 cores each, on the CPU"
    tight = plan_layout(config_with(**pool, retriever__num_cpus=0.5), num_cores=2, node_cores=2, num_gpus=0)
    assert tight.num_actors == 1
    assert tight.num_searchers * tight.searcher_cpus + 2 * tight.cpus_per_process <= 2
    on_gpu = plan_layout(config_with(**pool, retriever__num_gpus=0.25), num_cores=8, node_cores=8, num_gpus=1)
    assert (on_gpu.searcher_gpus, on_gpu.learner_gpus) == (0.25, 0.5)
    assert describe_layout(on_gpu)[0] == "2 search actors: 1 core each, 0.25 of a GPU"
    unused = plan_layout(config_with(retriever__num_actors=7), num_cores=2, node_cores=2, num_gpus=0)
    assert unused.num_searchers == 0
    assert len(describe_layout(unused)) == 2
    with pytest.raises(ConfigError, match=r"2 search actors with retriever.num_cpus = 1 would take 2 of .* 2 cores"):
        plan_layout(config_with(**pool), num_cores=2, node_cores=2, num_gpus=0)
    with pytest.raises(ConfigError, match=r"pool of search actors with 2, need 3 GPUs, the cluster has 2"):
        plan_layout(
            config_with(**pool, retriever__num_gpus=1.0, learner__num_gpus=1.0), num_cores=8, node_cores=8, num_gpus=2
        )


@pytest.mark.parametrize(
    ("settings", "num_gpus", "message"),
    [
        ({"rollout__num_gpus": 0.5}, 0, "rollout.num_gpus = 0.5 and a learner with 0 need 0.5 GPUs, the cluster has 0"),
        ({"rollout__num_gpus": 1.0}, 1, "rollout.num_gpus = 1: with 1 actor the 1 GPU of the cluster would be used up"),
        ({"learner__num_gpus": 1.0}, 0, "a learner with 1 need 1 GPU, the cluster has 0"),
        ({"rollout__num_gpus": 0.5, "learner__num_gpus": 0.6}, 1, "need 1.1 GPUs, the cluster has 1"),
    ],
)
def test_more_gpus_than_there_are_are_refused(settings: dict[str, object], num_gpus: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layout(config_with(**settings), num_cores=8, node_cores=8, num_gpus=num_gpus)


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
    made = learner_settings(config_with(**changes), device="cpu")
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
    wanted = learner_settings(config_with(learner__autocast="bfloat16"), device="cpu")
    assert wanted == benchmark.SETTINGS


def _attributes_read() -> set[str]:
    """All names that stand after a dot in the modules that read settings."""
    folders = ("run", "preparation")
    files = [*(path for name in folders for path in (ROOT / "rexrag" / name).glob("*.py"))]
    files += [ROOT / "rexrag" / name for name in ("recipe.py", "standalone.py")]
    return {
        node.attr
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
