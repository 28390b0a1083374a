"""How cores, GPUs and nodes are shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from rexrag.config import Config
from rexrag.errors import ConfigError
from rexrag.recipe import flatten, load_recipe, make_config
from rexrag.run.layout import describe_layout, plan_cluster, plan_machine, wanted_bundles
from rexrag.run.part_settings import device_of


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
        ({"rollout__num_gpus": 2.0, "rollout__tensor_parallel": 2}, 8, 3, 1.0),
        ({"rollout__num_gpus": 4.0, "rollout__tensor_parallel": 4, "learner__num_gpus": 0.0}, 8, 2, 0.0),
        ({"rollout__num_gpus": 0.2, "rollout__num_actors": 4, "learner__num_gpus": 0.1}, 1, 4, 0.1),
    ],
)
def test_gpus_are_shared(settings: dict[str, object], num_gpus: float, num_actors: int, learner_gpus: float) -> None:
    layout = plan_machine(config_with(**settings), num_cores=8, num_gpus=num_gpus)
    assert layout.num_actors == num_actors
    assert layout.learner.gpus == pytest.approx(learner_gpus)
    assert device_of(layout.learner.gpus) == ("cuda" if learner_gpus else "cpu")


def test_the_shares_are_told_in_words() -> None:
    layout = plan_machine(config_with(rollout__num_gpus=0.5), num_cores=2, num_gpus=1)
    assert describe_layout(layout) == [
        "1 rollout actor: 2 threads each, 0.5 of a GPU, 12 groups at once",
        "learner: 2 threads, 0.5 of a GPU",
    ]


def test_the_recipe_of_search_r1s_task_fills_the_machine_that_it_is_for() -> None:
    config = load_recipe(Path(__file__).parents[2] / "recipes" / "search-r1.toml").config
    assert describe_layout(plan_machine(config, num_cores=64, num_gpus=8)) == [
        "1 search actor: 4 threads each, 1 GPU",
        "3 rollout actors: 21 threads each, 1 GPU, 51 groups at once",
        "learner: 4 ranks, 16 threads each, 1 GPU",
    ]


@pytest.mark.parametrize(
    ("settings", "num_gpus", "message"),
    [
        ({"rollout__num_gpus": 0.5}, 0, "rollout.num_gpus = 0.5 and a learner with 0 need 0.5 GPUs, the cluster has 0"),
        ({"rollout__num_gpus": 1.0}, 1, "rollout.num_gpus = 1: with 1 actor the 1 GPU of the cluster would be used up"),
        ({"learner__num_gpus": 1.0}, 0, "a learner with 1 need 1 GPU, the cluster has 0"),
        ({"rollout__num_gpus": 1.0, "rollout__autoscale": {"min": 2, "max": 4}}, 2, "2 rollout actors .* need 3 GPUs"),
        ({"rollout__num_gpus": 0.5, "learner__num_gpus": 0.6}, 1, "need 1.1 GPUs, the cluster has 1"),
    ],
)
def test_more_gpus_than_there_are_are_refused(settings: dict[str, object], num_gpus: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_machine(config_with(**settings), num_cores=8, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("settings", "num_gpus", "num_actors", "rank_gpus", "rank_threads"),
    [
        ({}, 0, 4, 0.0, 4),
        ({}, 2, 4, 1.0, 4),
        ({"rollout__num_gpus": 1.0}, 8, 6, 1.0, 4),
        ({"rollout__num_gpus": 0.5, "rollout__num_actors": 2}, 3, 2, 1.0, 4),
        ({"learner__num_gpus": 0.0, "learner__threads": 3}, 2, 4, 0.0, 3),
    ],
)
def test_ranks_have_whole_gpus_and_share_the_cores(
    settings: dict[str, object], num_gpus: float, num_actors: int, rank_gpus: float, rank_threads: int
) -> None:
    layout = plan_machine(config_with(learner__num_ranks=2, **settings), num_cores=8, num_gpus=num_gpus)
    assert (layout.num_actors, layout.num_ranks) == (num_actors, 2)
    assert (layout.learner.gpus, layout.learner.threads) == (rank_gpus, rank_threads)


def test_ranks_are_told_and_refused_where_they_do_not_fit() -> None:
    layout = plan_machine(config_with(learner__num_ranks=2), num_cores=8, num_gpus=2)
    assert describe_layout(layout)[1] == "learner: 2 ranks, 4 threads each, 1 GPU"
    with pytest.raises(ConfigError, match=r"a learner with 4 need 4 GPUs, the cluster has 2 .*learner\.num_ranks"):
        plan_machine(config_with(learner__num_ranks=4), num_cores=8, num_gpus=2)
    with pytest.raises(ConfigError, match=r"learner\.num_gpus = 0\.5: must be 1 or 0 with learner\.num_ranks = 2"):
        config_with(learner__num_ranks=2, learner__num_gpus=0.5)


@pytest.mark.parametrize(
    ("nodes", "num_actors"),
    [
        ([{"CPU": 8.0, "GPU": 8.0}], 6),  # beside one another
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}], 1),  # on the larger node alone, or over both
        ([{"CPU": 8.0, "GPU": 1.0}] * 3, 1),  # over nodes
    ],
)
def test_ranks_go_to_as_few_nodes_as_have_room(nodes: list[dict[str, float]], num_actors: int) -> None:
    config = config_with(learner__num_ranks=2, learner__threads=1, rollout__num_gpus=1.0, rollout__threads_per_actor=1)
    layout = plan_cluster(config, nodes=nodes)
    assert (layout.num_fitting, layout.learner.bundle) == (num_actors, {"CPU": 1.0, "GPU": 1.0})
    assert wanted_bundles(config, nodes=nodes)[:2] == [{"CPU": 1.0, "GPU": 1.0}] * 2
    with pytest.raises(ConfigError, match=r"no node .* has room for the learner \(2 ranks, each 1 CPU, 1 GPU\)"):
        plan_cluster(config_with(learner__num_ranks=2, learner__threads=1), nodes=[{"CPU": 8.0, "GPU": 1.0}])


def test_search_actors_on_gpus_do_not_push_the_learner_off_without_a_word() -> None:
    pool = {"retriever__kind": "ray", "retriever__num_gpus": 1.0}
    with pytest.raises(
        ConfigError, match=r"retriever\.num_gpus = 1: with 1 search actor the 1 GPU .* would be used up"
    ):
        plan_machine(config_with(**pool), num_cores=8, num_gpus=1)
    assert plan_machine(config_with(**pool), num_cores=8, num_gpus=2).learner.gpus == 1.0
    assert plan_machine(config_with(**pool, learner__num_gpus=0.0), num_cores=8, num_gpus=1).learner.gpus == 0.0


def test_autoscale_bounds_say_how_many_threads_an_actor_has() -> None:
    layout = plan_machine(config_with(rollout__autoscale={"min": 1, "max": 2}), num_cores=16, num_gpus=0)
    assert (layout.num_actors, layout.actor.threads) == (2, 8)


def test_where_an_actor_would_take_the_only_gpu_an_autoscaler_is_asked_for_the_learners() -> None:
    config, nodes = config_with(rollout__num_gpus=1.0), [{"CPU": 4.0, "GPU": 1.0}]
    with pytest.raises(ConfigError, match="would be used up"):
        plan_cluster(config, nodes=nodes)
    learner, actor = wanted_bundles(config, nodes=nodes)
    assert (learner["GPU"], actor["GPU"]) == (1.0, 1.0)


SMALL = {"CPU": 4.0}
LARGE = {"CPU": 16.0, "GPU": 4.0}


def test_actors_without_a_place_are_told() -> None:
    told = describe_layout(plan_cluster(config_with(rollout__num_actors=9), nodes=[SMALL, SMALL]))
    assert told == [
        "9 rollout actors: 4 threads each, on the CPU, reserves 4 CPUs, 12 groups at once",
        "learner: 2 threads, on the CPU, reserves 2 CPUs",
        "room for 1 of the rollout actors now; the others join when there is more",
    ]


def test_on_the_own_machine_nothing_is_reserved() -> None:
    layout = plan_machine(config_with(rollout__resources={"rollout": 1}), num_cores=8, num_gpus=0)
    assert layout.actor.bundle == layout.learner.bundle == {}
    assert (layout.actor.threads, layout.learner.threads) == (2, 8)


@pytest.mark.parametrize(
    ("settings", "nodes", "num_actors", "actor", "learner"),
    [
        ({}, [SMALL, SMALL, SMALL], 2, {"CPU": 4.0}, {"CPU": 2.0}),
        ({"rollout__threads_per_actor": 2}, [SMALL, SMALL, SMALL], 5, {"CPU": 2.0}, {"CPU": 2.0}),
        ({"learner__threads": 4}, [SMALL, SMALL, SMALL], 2, {"CPU": 4.0}, {"CPU": 4.0}),
        ({}, [SMALL], 1, {"CPU": 2.0}, {"CPU": 2.0}),
        ({"rollout__num_actors": 9}, [SMALL, SMALL], 9, {"CPU": 4.0}, {"CPU": 2.0}),
        ({"rollout__num_gpus": 0.5}, [LARGE, SMALL], 6, {"CPU": 1.0, "GPU": 0.5}, {"CPU": 8.0, "GPU": 1.0}),
        (
            {"rollout__num_gpus": 1.0, "rollout__num_actors": 4},
            [{"CPU": 4.0, "GPU": 1.0}] * 2,
            4,
            {"CPU": 2.0, "GPU": 1.0},
            {"CPU": 2.0, "GPU": 1.0},
        ),
        ({"rollout__num_gpus": 1.0}, [LARGE, LARGE], 7, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}),
        (
            {"rollout__num_gpus": 0.5, "rollout__threads_per_actor": 1, "learner__num_gpus": 0.5},
            [LARGE],
            7,
            {"CPU": 1.0, "GPU": 0.5},
            {"CPU": 8.0, "GPU": 0.5},
        ),
        (
            {"rollout__resources": {"rollout": 1}, "learner__resources": {"learner": 1}},
            [{"CPU": 8.0, "learner": 1.0}, {"CPU": 8.0, "rollout": 1.0}, {"CPU": 8.0, "rollout": 1.0}],
            2,
            {"CPU": 4.0, "rollout": 1.0},
            {"CPU": 4.0, "learner": 1.0},
        ),
        ({"rollout__autoscale": {"min": 3, "max": 4}}, [SMALL, SMALL, SMALL], 3, {"CPU": 4.0}, {"CPU": 2.0}),
    ],
)
def test_on_a_cluster_a_part_reserves_what_it_computes_with(
    settings: dict[str, object],
    nodes: list[dict[str, float]],
    num_actors: int,
    actor: dict[str, float],
    learner: dict[str, float],
) -> None:
    layout = plan_cluster(config_with(**settings), nodes=nodes)
    assert layout.num_actors == num_actors
    assert layout.actor.bundle == actor
    assert layout.learner.bundle == learner
    assert layout.actor.threads == actor["CPU"]
    assert layout.learner.threads == learner["CPU"]


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ({}, [], r"no node of the cluster has room for the learner \(1 CPU\); its nodes: none; add nodes"),
        ({}, [{"CPU": 1.0}], r"and beside it a rollout actor \(1 CPU\); its nodes: 1 CPU;"),
        ({"learner__threads": 8}, [SMALL, SMALL], r"room for the learner \(8 CPUs\); its nodes: 4 CPUs; 4 CPUs;"),
        ({"rollout__resources": {"rollout": 1}}, [SMALL], r"beside it a rollout actor \(4 CPUs, 1 rollout\)"),
        ({"rollout__num_gpus": 1.0}, [SMALL], r"beside it a rollout actor \(2 CPUs, 1 GPU\)"),
    ],
)
def test_a_cluster_that_is_too_small_says_what_is_missing(
    settings: dict[str, object], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_cluster(config_with(**settings), nodes=nodes)


def test_a_pool_of_search_actors_has_its_share_first() -> None:
    pool = {"retriever__kind": "ray", "retriever__num_actors": 2}
    layout = plan_machine(config_with(**pool, retriever__num_cpus=2.0), num_cores=8, num_gpus=0)
    assert (layout.num_searchers, layout.searcher.threads, layout.searcher.bundle) == (2, 2, {})
    assert layout.num_actors == 2, "one for two of the cores that are left"
    assert describe_layout(layout)[0] == "2 search actors: 2 threads each, on the CPU"
    on_gpu = plan_machine(config_with(**pool, retriever__num_gpus=0.25), num_cores=8, num_gpus=1)
    assert (on_gpu.searcher.gpus, on_gpu.learner.gpus) == (0.25, 0.5)
    unused = plan_machine(config_with(retriever__num_actors=7), num_cores=2, num_gpus=0)
    assert unused.num_searchers == 0
    assert len(describe_layout(unused)) == 2
    with pytest.raises(ConfigError, match=r"pool of search actors with 2, need 3 GPUs, the cluster has 2"):
        plan_machine(config_with(**pool, retriever__num_gpus=1.0, learner__num_gpus=1.0), num_cores=8, num_gpus=2)


def test_a_pool_has_its_place_on_a_cluster() -> None:
    pool = config_with(retriever__kind="ray", retriever__num_actors=2, retriever__resources={"retriever": 1})
    nodes: list[dict[str, float]] = [SMALL, {**SMALL, "retriever": 1}, {**SMALL, "retriever": 1}]
    layout = plan_cluster(pool, nodes=nodes)
    assert layout.searcher.bundle == {"CPU": 1.0, "retriever": 1.0}
    assert (layout.num_searchers, layout.num_actors) == (2, 1)
    assert layout.actor.threads == 4, "learner and search actor share a node"
    with pytest.raises(ConfigError, match=r"2 search actors \(1 CPU, 1 retriever each\)"):
        plan_cluster(pool, nodes=nodes[:2])
