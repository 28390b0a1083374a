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
        learner: the share of each of its ranks.
        num_searchers: search actors, none but with `retriever.kind = "ray"`.
    """

    num_actors: int
    num_fitting: int
    num_groups: int
    actor: Share
    learner: Share
    num_ranks: int = 1
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
    rank_gpus = _rank_gpus(config, num_gpus, num_actors=config.rollout.num_actors or 1)
    num_ranks = config.learner.num_ranks
    learner_gpus = num_ranks * rank_gpus
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
            "use: lower these shares, learner.num_ranks, rollout.num_actors or the least of rollout.autoscale, or set "
            "the shares to 0 to compute on CPUs"
        )
    threads = config.rollout.threads_per_actor or max(1, num_cores // num_actors)
    return Layout(
        num_actors=num_actors,
        num_fitting=num_actors,
        num_groups=_num_groups(config),
        actor=Share(threads=threads, gpus=share, cpus=0.0, resources={}),
        learner=Share(
            threads=config.learner.threads or max(1, num_cores // num_ranks), gpus=rank_gpus, cpus=0.0, resources={}
        ),
        num_ranks=num_ranks,
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
    num_ranks = config.learner.num_ranks
    num_searchers, searcher = _searchers(config)
    first = [*[learner] * num_ranks, *[searcher] * num_searchers]
    actor = preferred
    num_fitting = _num_beside(nodes, first, actor, num_ranks=num_ranks)
    while num_fitting == 0 and config.rollout.threads_per_actor is None and actor.threads > 1:
        actor = replace(actor, threads=actor.threads - 1, cpus=actor.cpus - 1.0)
        num_fitting = _num_beside(nodes, first, actor, num_ranks=num_ranks)
    if num_fitting < 1:
        there = "; ".join(in_words(node) for node in nodes) or "none"
        each = f"{num_ranks} ranks, each " if num_ranks > 1 else ""
        lacking = f"the learner ({each}{in_words(learner.bundle)})"
        if num_searchers:
            lacking += f" and {counted(num_searchers, 'search actor')} ({in_words(searcher.bundle)} each)"
        if num_fitting == 0:
            lacking += f" and beside it a rollout actor ({in_words(preferred.bundle)})"
        raise ConfigError(
            f"no node of the cluster has room for {lacking}; its nodes: {there}; add nodes, or lower learner.threads, "
            "learner.num_ranks, rollout.threads_per_actor, the shares of GPUs or the resources"
        )
    return Layout(
        num_actors=_within_bounds(config, config.rollout.num_actors or num_fitting),
        num_fitting=num_fitting,
        num_groups=_num_groups(config),
        actor=actor,
        learner=learner,
        num_ranks=num_ranks,
        num_searchers=num_searchers,
        searcher=searcher,
    )


def cluster_shares(config: Config, *, nodes: Sequence[Resources]) -> tuple[Share, Share]:
    """What a rank of the learner and an actor reserve on a cluster; threads without a setting follow from its nodes.

    Raises:
        ConfigError: one actor would leave no GPU for the learner; further ones join when there is more.
    """
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    return _shares(config, nodes=nodes, rank_gpus=_rank_gpus(config, num_gpus, num_actors=1))


def _shares(config: Config, *, nodes: Sequence[Resources], rank_gpus: float) -> tuple[Share, Share]:
    num_ranks = config.learner.num_ranks
    learner_cores = _most_cores(nodes, config.learner.resources)
    learner_threads = config.learner.threads or max(1, learner_cores // 2 // num_ranks)
    actor_cores = _most_cores(nodes, config.rollout.resources)
    if config.rollout.num_gpus:  # so many that all shares of GPUs can be used, beside the learner
        most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        num_here = min(num_ranks, int(most_gpus / rank_gpus + _SLACK)) if rank_gpus else num_ranks
        places = max(1, _gpu_places(most_gpus - num_here * rank_gpus, config.rollout.num_gpus))
        actor_cores = max(0, actor_cores - num_here * learner_threads) // places
    actor_threads = config.rollout.threads_per_actor or max(1, min(ACTOR_THREADS, actor_cores))
    return (
        Share(
            threads=learner_threads,
            gpus=rank_gpus,
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
        learner, actor = _shares(config, nodes=nodes, rank_gpus=1.0)
    num_searchers, searcher = _searchers(config)
    num_actors = _within_bounds(config, config.rollout.num_actors or 1)
    ranks = [learner.bundle] * config.learner.num_ranks
    return [*ranks, *[searcher.bundle] * num_searchers, *[actor.bundle] * num_actors]


def describe_layout(layout: Layout) -> list[str]:
    """Which part gets which share, a line each."""

    def place(share: Share) -> str:
        gpus = share.gpus
        where = f"{gpus:g} of a GPU" if 0 < gpus < 1 else counted(gpus, "GPU") if gpus else "on the CPU"
        reserved = {name: amount for name, amount in share.bundle.items() if name != "GPU"}
        return f"{where}, reserves {in_words(reserved)}" if reserved else where

    ranks, each = (f"{layout.num_ranks} ranks, ", " each") if layout.num_ranks > 1 else ("", "")
    lines = [
        f"{counted(layout.num_actors, 'rollout actor')}: {counted(layout.actor.threads, 'thread')} each, "
        f"{place(layout.actor)}, {counted(layout.num_groups, 'group')} at once",
        f"learner: {ranks}{counted(layout.learner.threads, 'thread')}{each}, {place(layout.learner)}",
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


def _rank_gpus(config: Config, num_gpus: float, *, num_actors: int) -> float:
    """The share of each of the learner's ranks where there are so many GPUs, beside so many actors.

    A learner that is one process takes what is left, at most a whole one; ranks have whole ones.

    Raises:
        ConfigError: nothing is left.
    """
    if config.learner.num_gpus is not None:
        return config.learner.num_gpus
    num_searchers, searcher = _searchers(config)
    taken = num_actors * config.rollout.num_gpus + num_searchers * searcher.gpus
    left = min(1.0, max(0.0, num_gpus - taken))
    if taken and num_gpus and not left:
        taking = [
            (f"{key} = {share:g}", counted(num, who))
            for key, share, num, who in (
                ("rollout.num_gpus", config.rollout.num_gpus, num_actors, "actor"),
                ("retriever.num_gpus", searcher.gpus, num_searchers, "search actor"),
            )
            if share and num
        ]
        raise ConfigError(
            f"{taking[0][0]}: with {' and '.join(who for _, who in taking)} the {counted(num_gpus, 'GPU')} of the "
            "cluster would be used up, and the learner would be on the CPU; lower the shares, such as to 0.5, or say "
            "learner.num_gpus = 0 if that is meant"
        )
    return 1.0 if left and config.learner.num_ranks > 1 else left


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


def _num_beside(nodes: Sequence[Resources], first: Sequence[Share], actor: Share, *, num_ranks: int) -> int:
    """How many actors fit beside the parts that are placed first, the learner wherever that is best; -1: they do not.

    Its further ranks go to the same node as far as it has room. Search actors, and ranks that have to go elsewhere, go
    where most cores are left, as Ray spreads them.
    """
    best = -1
    for home in range(len(nodes)):
        left = _placed(nodes, home, first[0])
        for index, share in enumerate(first[1:], start=1):
            if left is None:
                break
            beside = _placed(left, home, share) if index < num_ranks else None
            left = beside if beside is not None else _spread(left, share)
        if left is not None:
            best = max(best, _num_fitting(left, actor))
    return best


def _placed(nodes: Sequence[Resources], index: int, share: Share) -> list[Resources] | None:
    """What is left of the nodes once one of them has a part; None: it has no room for it."""
    node = nodes[index]
    left = {name: node.get(name, 0.0) - share.bundle.get(name, 0.0) for name in {*node, *share.bundle}}
    if min(left.values(), default=0.0) < -_SLACK:
        return None
    return [*nodes[:index], left, *nodes[index + 1 :]]


def _spread(nodes: Sequence[Resources], share: Share) -> list[Resources] | None:
    """What is left of the nodes once a part is where the fullest one then has most cores; None: there is no room."""
    options = [left for index in range(len(nodes)) if (left := _placed(nodes, index, share)) is not None]
    return max(options, key=lambda nodes: min(node.get("CPU", 0.0) for node in nodes), default=None)


def _num_fitting(nodes: Sequence[Resources], share: Share) -> int:
    total = 0
    for node in nodes:
        counts = [int(node.get(name, 0.0) / amount + _SLACK) for name, amount in share.bundle.items() if name != "GPU"]
        if share.gpus:
            counts.append(_gpu_places(node.get("GPU", 0.0), share.gpus))
        total += min(counts, default=0)
    return total
