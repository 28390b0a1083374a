"""The nodes of the cluster that a run has joined: what they have, whether they are enough, and what they can see."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ray
import torch
from ray._private.state import state
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rexrag.config import Config
from rexrag.errors import ConfigError, RunFailure, first_line
from rexrag.processes import Resources
from rexrag.reporting.terminal import Progress
from rexrag.run.joining import joined
from rexrag.run.layout import Layout, plan_cluster, wanted_bundles
from rexrag.run.signals import StopSignal

LOG = logging.getLogger(__name__)
LOOK_EVERY_S: Final = 2.0
PROBE_TIMEOUT_S: Final = 120.0
_OF_RAY: Final = ("memory", "object_store_memory")


def cluster_nodes() -> list[Resources]:
    """What each living node that stays has, by Ray's names. GPUs are none where torch is built for the CPU alone."""
    return [resources for _, resources in _nodes()]


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that will go: they were told to, by a preemption, an autoscaler or an operator."""
    return frozenset(state.get_draining_nodes())


def nodes_at(address: str) -> list[Resources]:
    """`cluster_nodes` of a cluster that is joined for as long as it takes.

    Raises:
        ConfigError: no cluster there.
    """
    with joined(address):
        return cluster_nodes()


def wait_for_layout(config: Config, *, progress: Progress, stop: StopSignal) -> Layout:
    """The parts on this cluster, once its nodes can hold them; an autoscaler is asked for nodes meanwhile.

    The wait is bounded by `train.stall_timeout_s` without a change among the nodes.

    Raises:
        ConfigError: the nodes are not enough.
        Interrupted: a stop signal came.
    """
    seen: list[Resources] | None = None
    changed_at = time.monotonic()
    try:
        while True:
            nodes = cluster_nodes()
            try:
                return plan_cluster(config, nodes=nodes)
            except ConfigError as error:
                if nodes != seen:
                    seen, changed_at = nodes, time.monotonic()
                    progress.note(f"waiting for nodes: {error}")
                    _ask_autoscaler(wanted_bundles(config, nodes=nodes))
                if time.monotonic() - changed_at > config.train.stall_timeout_s:
                    raise ConfigError(
                        f"{error}; waited {config.train.stall_timeout_s:.0f} s without a change (train.stall_timeout_s)"
                    ) from None
            stop.heed(" while it waited for nodes")
            time.sleep(LOOK_EVERY_S)
    finally:
        if seen is not None:
            _ask_autoscaler([])  # what is started from now on asks by itself, and a run that gives up wants nothing


def probe_paths(paths: Mapping[str, Path], *, writable: Path) -> bool:
    """Make sure that every node sees the files that the parts read, and can write into the run folder.

    Args:
        paths: by the setting that names them.

    Returns:
        Whether all nodes were there to be asked. Where one went meanwhile, what was planned for it has no place.

    Raises:
        ConfigError: names the node, the setting and the path.
        RunFailure: a node does not answer.
    """
    nodes = [node for node, _ in _nodes()]
    if len(nodes) < 2:
        return True
    look: Any = ray.remote(num_cpus=0)(_missing)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
            {setting: str(path) for setting, path in paths.items()}, str(writable)
        )
        for node_id, _ in nodes
    ]
    problems, unanswered = list[str](), dict[str, str]()
    for (node_id, name), ref in zip(nodes, asked, strict=True):
        try:
            problems += [f"node {name}: {problem}" for problem in ray.get(ref, timeout=PROBE_TIMEOUT_S)]
        except RayError as error:
            unanswered[node_id] = f"{name} ({first_line(error)})"
    living = {node_id for (node_id, _), _ in _nodes()} if unanswered else set()
    for node_id in unanswered.keys() - living:
        LOG.warning("a node is gone before it was asked whether it sees the run's files: %s", unanswered[node_id])
    if silent := [told for node_id, told in unanswered.items() if node_id in living]:
        raise RunFailure(
            f"these nodes do not say whether they see the run's files: {', '.join(silent)}; where they are only busy, "
            "give the command again"
        )
    if problems:
        raise ConfigError(
            "\n".join(problems) + "\nPut what is missing on storage that all nodes share, at the same path on each."
        )
    return not unanswered


def _missing(paths: Mapping[str, str], writable: str) -> list[str]:
    """Runs on a node."""
    problems = [f"{setting} = {path}: is not there" for setting, path in paths.items() if not os.path.exists(path)]
    if not os.access(writable, os.W_OK):
        problems.append(f"--run-dir = {writable}: cannot be written to")
    return problems


def _nodes() -> list[tuple[tuple[str, str], Resources]]:
    """Id, name and resources of each living node; on one that will go nothing new finds a place."""
    leaving = draining_nodes()
    has_cuda = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
    return [
        (
            (node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"),
            {
                name: float(amount)
                for name, amount in node["Resources"].items()
                if name not in _OF_RAY and not name.startswith("node:") and (has_cuda or name != "GPU")
            },
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    request_resources(bundles=bundles)
