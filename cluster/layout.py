"""What a cluster on Kubernetes consists of: groups of nodes, their sizes, and what the job asks of them.

Everything that stands in more than one place of a manifest, or in a manifest and on a command line, is named here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

NAME: Final = "rexrag"
JOB: Final = "rexrag-train"
CLAIM: Final = "rexrag-shared"
TOKEN_SECRET: Final = "rexrag-token"
"""Its key is `auth_token`, the one that KubeRay reads."""
REDIS_SECRET: Final = "rexrag-redis"
REDIS_ADDRESS: Final = "redis:6379"
OPERATOR_NAMESPACE: Final = "ray-system"
SHARED: Final = "/shared"
RUN_DIR: Final = f"{SHARED}/runs/first"
USER_ID: Final = 1000
"""The user of cluster/Dockerfile."""

DASHBOARD_PORT: Final = 8265
GCS_PORT: Final = 6379
AGENT_PORT: Final = 52365
BOARD_PORT: Final = 6006

STOP_WAIT_S: Final = 600
"""From a stop's SIGTERM to its SIGKILL: a step and a checkpoint must fit."""
RETRIES: Final = 3
DRAIN_S: Final = 90
"""How long Ray lets a node finish what it does after SIGTERM."""
TERMINATION_S: Final = DRAIN_S + 30

LEARNER: Final = "learner"
ROLLOUT: Final = "rollout"
RETRIEVER: Final = "retriever"
DRIVER: Final = "driver"
"""Custom resources of Ray. A node has one of each part that it may hold; `driver` places the job's own process."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Worker pods of one kind. `memory_gib` and `scratch_gib` are of one pod; `gpus` are whole ones."""

    name: str
    cpus: int
    memory_gib: int
    scratch_gib: int
    gpus: int = 0
    replicas: int = 1
    max_replicas: int = 1
    resources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A cluster and the job on it. With `redis` the head's state outlives the head."""

    head_cpus: int
    head_memory_gib: int
    groups: tuple[Group, ...]
    storage_gib: int
    autoscaled: bool
    redis: bool
    recipe: str

    @property
    def rollout(self) -> Group:
        """The group that grows and shrinks."""
        return next(group for group in self.groups if ROLLOUT in group.resources)


FULL: Final = Layout(
    head_cpus=4,
    head_memory_gib=16,
    groups=(
        Group(name=LEARNER, cpus=16, memory_gib=128, scratch_gib=100, gpus=1, resources={LEARNER: 1, DRIVER: 1}),
        Group(name=ROLLOUT, cpus=8, memory_gib=64, scratch_gib=50, gpus=1, max_replicas=8, resources={ROLLOUT: 1}),
        Group(name=RETRIEVER, cpus=16, memory_gib=64, scratch_gib=20, max_replicas=2, resources={RETRIEVER: 1}),
    ),
    storage_gib=500,
    autoscaled=True,
    redis=True,
    recipe=f"{SHARED}/recipes/first.toml",
)

SMALL: Final = Layout(
    head_cpus=1,
    head_memory_gib=4,
    groups=(
        Group(name=LEARNER, cpus=4, memory_gib=8, scratch_gib=10, resources={LEARNER: 1, DRIVER: 1, RETRIEVER: 1}),
        Group(name=ROLLOUT, cpus=2, memory_gib=6, scratch_gib=10, resources={ROLLOUT: 1}),
    ),
    storage_gib=20,
    autoscaled=False,
    redis=False,
    recipe="/opt/rexrag/recipes/synthetic.toml",
)


def settings(layout: Layout) -> dict[str, str]:
    """Recipe keys that must fit the cluster, as words of `--set`: which nodes hold which part, how many, which GPUs."""
    parts = (LEARNER, ROLLOUT, RETRIEVER)
    words = {f"{part}.resources": f"{{{part}=1}}" for part in parts}
    words |= {f"{group.name}.num_gpus": str(group.gpus) for group in layout.groups if group.gpus}
    if layout.autoscaled:
        words["rollout.autoscale"] = f"{{min={layout.rollout.replicas},max={layout.rollout.max_replicas}}}"
    return words


def versions() -> tuple[str, str]:
    """Versions of rexrag and of Ray, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = [need.partition("==")[2] for need in project["dependencies"] if need.startswith("ray[")]
    return str(project["version"]), ray
