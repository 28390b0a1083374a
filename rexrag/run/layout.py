"""How cores, GPUs and nodes are shared: what each part computes with, and what Ray reserves for it.

On this machine alone learner and actors share the cores: each gets threads for all of them, since one mostly waits for
the other, and nothing is reserved. On a cluster, which others may use too, a part reserves what it computes with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from rexrag.config import Config
from rexrag.errors import ConfigError, counted
from rexrag.processes import Resources, Share, in_words

ACTOR_THREADS: Final = 4
"""Threads of an actor on a cluster, where `rollout.threads_per_actor` does not say: few enough to fit on most nodes."""
_SLACK: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a run.

    Attributes:
        num_groups: groups that one actor runs at once.
        num_fitting: actors for which there is room now.
        num_searchers: search actors, none but with `retriever.kind = "ray"`.
    """

    num_actors: int
    num_fitting: int
    num_groups: int
    actor: Share
    learner: Share
    num_searchers: int = 0
    searcher: Share = field(default_factory=lambda: Share(threads=1))


def plan_machine(config: Config, *, num_cores: int, num_gpus: float) -> Layout:
    """The parts on one machine that is the run's own: half as many actors as cores, on GPUs as many as they hold.

    Of the GPUs the learner's share comes first: a whole one where there are more, else what one actor leaves.

    Args:
        num_gpus: those that torch can use.

    Raises:
        ConfigError: learner and actors reserve more GPUs than there are, for which Ray would wait for ever, or actors
            on GPUs would leave none for the learner.
    """
    share = config.rollout.num_gpus
    num_searchers, searcher = _searchers(config)
    pool_gpus = num_searchers * searcher.gpus
    learner_gpus = _learner_gpus(config, num_gpus - pool_gpus, num_actors=config.rollout.num_actors or 1)
    if config.rollout.num_actors is not None:
        num_actors = config.rollout.num_actors
    elif share:
        num_actors = max(1, _gpu_places(num_gpus - pool_gpus - learner_gpus, share))
    else:
        num_actors = max(1, int(num_cores - num_searchers * searcher.cpus) // 2)
    num_actors = _within_bounds(config, num_actors)
    needed_gpus = num_actors * share + learner_gpus + pool_gpus
    if needed_gpus > num_gpus:
        pool = f", and a pool of search actors with {pool_gpus:g}," if pool_gpus else ""
        raise ConfigError(
            f"{counted(num_actors, 'rollout actor')} with rollout.num_gpus = {share:g} and a learner with "
            f"{learner_gpus:g}{pool} need {counted(needed_gpus, 'GPU')}, the cluster has {num_gpus:g} that torch can "
            "use: lower these shares, rollout.num_actors or the least of rollout.autoscale, or set the shares to 0 to "
            "compute on CPUs"
        )
    threads = config.rollout.threads_per_actor or max(1, num_cores // num_actors)
    return Layout(
        num_actors=num_actors,
        num_fitting=num_actors,
        num_groups=_num_groups(config),
        actor=Share(threads=threads, gpus=share, cpus=0.0, resources={}),
        learner=Share(threads=config.learner.threads or num_cores, gpus=learner_gpus, cpus=0.0, resources={}),
        num_searchers=num_searchers,
        searcher=replace(searcher, cpus=0.0, resources={}),
    )


def plan_cluster(config: Config, *, nodes: Sequence[Resources]) -> Layout:
    """The parts on a cluster: the learner, and as many actors as fit beside it.

    Where `rollout.num_actors` asks for more than fit, the others join when there is room.

    Args:
        nodes: what each node has.

    Raises:
        ConfigError: the nodes cannot hold the learner and one actor; says what is missing.
    """
    learner, preferred = cluster_shares(config, nodes=nodes)
    num_searchers, searcher = _searchers(config)
    first = [learner, *[searcher] * num_searchers]
    actor = preferred
    num_fitting = _num_beside(nodes, first, actor)
    while num_fitting == 0 and config.rollout.threads_per_actor is None and actor.threads > 1:
        actor = replace(actor, threads=actor.threads - 1, cpus=actor.cpus - 1.0)
        num_fitting = _num_beside(nodes, first, actor)
    if num_fitting < 1:
        there = "; ".join(in_words(node) for node in nodes) or "none"
        lacking = f"the learner ({in_words(learner.bundle)})"
        if num_searchers:
            lacking += f" and {counted(num_searchers, 'search actor')} ({in_words(searcher.bundle)} each)"
        if num_fitting == 0:
            lacking += f" and beside it a rollout actor ({in_words(preferred.bundle)})"
        raise ConfigError(
            f"no node of the cluster has room for {lacking}; its nodes: {there}; add nodes, or lower learner.threads, "
            "rollout.threads_per_actor, the shares of GPUs or the resources"
        )
    return Layout(
        num_actors=_within_bounds(config, config.rollout.num_actors or num_fitting),
        num_fitting=num_fitting,
        num_groups=_num_groups(config),
        actor=actor,
        learner=learner,
        num_searchers=num_searchers,
        searcher=searcher,
    )


def cluster_shares(config: Config, *, nodes: Sequence[Resources]) -> tuple[Share, Share]:
    """What learner and actor reserve on a cluster; threads that no setting names follow from its largest nodes.

    Raises:
        ConfigError: one actor would leave no GPU for the learner; further ones join when there is more.
    """
    num_searchers, searcher = _searchers(config)
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes) - num_searchers * searcher.gpus
    return _shares(config, nodes=nodes, learner_gpus=_learner_gpus(config, num_gpus, num_actors=1))


def _shares(config: Config, *, nodes: Sequence[Resources], learner_gpus: float) -> tuple[Share, Share]:
    learner_cores = _most_cores(nodes, config.learner.resources)
    learner_threads = config.learner.threads or max(1, learner_cores // 2)
    actor_cores = _most_cores(nodes, config.rollout.resources)
    if config.rollout.num_gpus:  # so many that all shares of GPUs can be used, beside the learner
        most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        places = max(1, _gpu_places(most_gpus - learner_gpus, config.rollout.num_gpus))
        actor_cores = max(0, actor_cores - learner_threads) // places
    actor_threads = config.rollout.threads_per_actor or max(1, min(ACTOR_THREADS, actor_cores))
    return (
        Share(
            threads=learner_threads,
            gpus=learner_gpus,
            cpus=float(learner_threads),
            resources=config.learner.resources,
        ),
        Share(
            threads=actor_threads,
            gpus=config.rollout.num_gpus,
            cpus=float(actor_threads),
            resources=config.rollout.resources,
        ),
    )


def wanted_bundles(config: Config, *, nodes: Sequence[Resources]) -> list[dict[str, float]]:
    """What an autoscaler is asked for: room for the learner, the search actors, and as many actors as are named.

    Where actors are on GPUs the learner is to have one, though the nodes of now may have none left for it.
    """
    try:
        learner, actor = cluster_shares(config, nodes=nodes)
    except ConfigError:
        learner, actor = _shares(config, nodes=nodes, learner_gpus=1.0)
    num_searchers, searcher = _searchers(config)
    num_actors = _within_bounds(config, config.rollout.num_actors or 1)
    return [learner.bundle, *[searcher.bundle] * num_searchers, *[actor.bundle] * num_actors]


def describe_layout(layout: Layout) -> list[str]:
    """Which part gets which share, a line each."""

    def place(share: Share) -> str:
        gpus = share.gpus
        where = f"{gpus:g} of a GPU" if 0 < gpus < 1 else counted(gpus, "GPU") if gpus else "on the CPU"
        reserved = {name: amount for name, amount in share.bundle.items() if name != "GPU"}
        return f"{where}, reserves {in_words(reserved)}" if reserved else where

    lines = [
        f"{counted(layout.num_actors, 'rollout actor')}: {counted(layout.actor.threads, 'thread')} each, "
        f"{place(layout.actor)}, {counted(layout.num_groups, 'group')} at once",
        f"learner: {counted(layout.learner.threads, 'thread')}, {place(layout.learner)}",
    ]
    if layout.num_searchers:
        searcher = f"{counted(layout.searcher.threads, 'thread')} each, {place(layout.searcher)}"
        lines.insert(0, f"{counted(layout.num_searchers, 'search actor')}: {searcher}")
    if layout.num_fitting < layout.num_actors:
        lines.append(f"room for {layout.num_fitting} of the rollout actors now; the others join when there is more")
    return lines


def _num_groups(config: Config) -> int:
    return max(1, config.rollout.episodes_per_actor // config.rollout.group_size)


def _searchers(config: Config) -> tuple[int, Share]:
    """The search actors inside the run, and what each has on a cluster."""
    retriever = config.retriever
    share = Share(
        threads=max(1, int(retriever.num_cpus)),
        gpus=retriever.num_gpus,
        cpus=retriever.num_cpus,
        resources=retriever.resources,
    )
    return (retriever.num_actors if retriever.kind == "ray" else 0), share


def _within_bounds(config: Config, num_actors: int) -> int:
    bounds = config.rollout.autoscale
    return min(max(num_actors, bounds["min"]), bounds["max"]) if bounds else num_actors


def _learner_gpus(config: Config, num_gpus: float, *, num_actors: int) -> float:
    """The learner's share beside so many actors.

    Raises:
        ConfigError: they leave it none.
    """
    if config.learner.num_gpus is not None:
        return config.learner.num_gpus
    taken = num_actors * config.rollout.num_gpus
    left = min(1.0, max(0.0, num_gpus - taken))
    if taken and num_gpus and not left:
        raise ConfigError(
            f"rollout.num_gpus = {config.rollout.num_gpus:g}: with {counted(num_actors, 'actor')} the "
            f"{counted(num_gpus, 'GPU')} of the cluster would be used up, and the learner would be on the CPU; "
            "lower it, such as to 0.5, or say learner.num_gpus = 0 if that is meant"
        )
    return left


def _gpu_places(num_gpus: float, share: float) -> int:
    """How often a share of a GPU fits, none over two of them, or a number of GPUs on one node."""
    if share > 1.0:
        return int(num_gpus / share + _SLACK)
    whole = int(num_gpus + _SLACK)
    return whole * int(1.0 / share + _SLACK) + int((num_gpus - whole) / share + _SLACK)


def _most_cores(nodes: Sequence[Resources], resources: Resources) -> int:
    """Cores of the largest node that has these resources; of any where none has."""
    fitting = [node for node in nodes if all(node.get(name, 0.0) >= amount for name, amount in resources.items())]
    return int(max((node.get("CPU", 0.0) for node in fitting or nodes), default=0.0))


def _num_beside(nodes: Sequence[Resources], first: Sequence[Share], actor: Share) -> int:
    """How many actors fit beside the parts that are placed first, the learner wherever that is best; -1: they do not.

    Search actors go where most cores are left, as Ray spreads them.
    """
    best = -1
    for placed in _with(nodes, first[0]):
        left: list[Resources] | None = placed
        for share in first[1:]:
            options = [] if left is None else _with(left, share)
            left = max(options, key=lambda nodes: min(node.get("CPU", 0.0) for node in nodes), default=None)
        if left is not None:
            best = max(best, _num_fitting(left, actor))
    return best


def _with(nodes: Sequence[Resources], share: Share) -> list[list[Resources]]:
    """What is left of the nodes, for each one that a part may be on."""
    found = []
    for index, node in enumerate(nodes):
        left = {name: node.get(name, 0.0) - share.bundle.get(name, 0.0) for name in {*node, *share.bundle}}
        if min(left.values(), default=0.0) >= -_SLACK:
            found.append([*nodes[:index], left, *nodes[index + 1 :]])
    return found


def _num_fitting(nodes: Sequence[Resources], share: Share) -> int:
    total = 0
    for node in nodes:
        counts = [int(node.get(name, 0.0) / amount + _SLACK) for name, amount in share.bundle.items() if name != "GPU"]
        if share.gpus:
            counts.append(_gpu_places(node.get("GPU", 0.0), share.gpus))
        total += min(counts, default=0)
    return total
