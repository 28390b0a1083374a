"""How the cores and GPUs of a cluster are shared."""

from __future__ import annotations

import pytest

from rexrag.config import Config
from rexrag.errors import ConfigError
from rexrag.recipe import flatten, make_config
from rexrag.run.part_settings import device_of, plan_layout


def config_with(**settings: object) -> Config:
    return make_config({**flatten(Config()), **{k.replace("__", "."): v for k, v in settings.items()}}, sources={})


@pytest.mark.parametrize(
    ("settings", "num_gpus", "num_actors", "learner_gpus"),
    [
        ({}, 0, 4, 0.0),
        ({}, 1, 4, 1.0),
        ({"learner__num_gpus": 0.0}, 1, 4, 0.0),
        ({"rollout__num_gpus": 0.5}, 1, 1, 0.5),
        ({"rollout__num_gpus": 0.75}, 4, 4, 1.0),
        ({"rollout__num_gpus": 1.0, "rollout__num_actors": 3}, 4, 3, 1.0),
        ({"rollout__num_gpus": 0.2, "rollout__num_actors": 4, "learner__num_gpus": 0.1}, 1, 4, 0.1),
    ],
)
def test_gpus_are_shared(settings: dict[str, object], num_gpus: float, num_actors: int, learner_gpus: float) -> None:
    layout = plan_layout(config_with(**settings), num_cores=8, node_cores=8, num_gpus=num_gpus)
    assert layout.num_actors == num_actors
    assert layout.learner_gpus == pytest.approx(learner_gpus)
    assert device_of(layout.learner_gpus) == ("cuda" if learner_gpus else "cpu")


@pytest.mark.parametrize(
    ("settings", "num_gpus", "message"),
    [
        ({"rollout__num_gpus": 0.5}, 0, "rollout.num_gpus = 0.5 and a learner with 0 need 0.5 GPUs, the cluster has 0"),
        ({"learner__num_gpus": 1.0}, 0, "a learner with 1 need 1 GPUs, the cluster has 0"),
        ({"rollout__num_gpus": 0.5, "learner__num_gpus": 0.6}, 1, "need 1.1 GPUs, the cluster has 1"),
    ],
)
def test_more_gpus_than_there_are_are_refused(settings: dict[str, object], num_gpus: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_layout(config_with(**settings), num_cores=8, node_cores=8, num_gpus=num_gpus)
