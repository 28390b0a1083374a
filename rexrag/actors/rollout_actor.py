"""Ray shell of a rollout actor: builds engine, retriever and runner in its own process, and delegates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, Protocol, cast

import ray
from ray.actor import ActorHandle

from rexrag.actors.build import RolloutSettings, build_runner, sampling_dtype
from rexrag.actors.rollout_loop import ActorPulse, RolloutLoop
from rexrag.engine.protocol import EngineStats
from rexrag.model.weight_proof import Delivery, WeightProof, Weights, WeightUpdate
from rexrag.processes import Share
from rexrag.reporting.log_file import log_process
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import AppendOutcome, EpisodeScore, GroupLease, LeaseKey, Question, WeightVersion

MAX_CALLS: Final = 64
"""Calls that one actor serves at once: `run` takes one of them, evaluations and weights the others."""


class RemoteHandle(Protocol):
    """A Ray actor handle: its methods have `remote`, and give awaitables."""

    def __getattr__(self, name: str) -> Any: ...  # noqa: ANN401


class _RemoteBuffer:
    """`BufferClient` over the handle of the replay actor."""

    def __init__(self, handle: RemoteHandle) -> None:
        self._handle = handle

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> Sequence[GroupLease]:
        leases: Sequence[GroupLease] = await self._handle.lease.remote(actor_id, num=num, held=held, wait_s=wait_s)
        return leases

    async def renew(self, actor_id: str, *, progress: Mapping[LeaseKey, int]) -> Sequence[LeaseKey]:
        gone: Sequence[LeaseKey] = await self._handle.renew.remote(actor_id, progress=progress)
        return gone

    async def hand_back(self, actor_id: str, *, lease: LeaseKey) -> None:
        await self._handle.hand_back.remote(actor_id, lease=lease)

    async def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> AppendOutcome:
        outcome: AppendOutcome = await self._handle.append.remote(actor_id, lease=lease, ipc=ipc)
        return outcome

    async def fail(self, actor_id: str, *, lease: LeaseKey, reason: str) -> None:
        await self._handle.fail.remote(actor_id, lease=lease, reason=reason)


class Built(NamedTuple):
    """A rollout actor that is ready: the id of its process, and the precision that it samples in."""

    pid: int
    dtype: Literal["float32", "bfloat16"]


class RolloutActor:
    """One engine with many concurrent episodes. `run` lasts until `stop`; all else answers meanwhile."""

    def __init__(
        self, actor_id: str, *, settings: RolloutSettings, version: WeightVersion, num_groups: int, buffer: RemoteHandle
    ) -> None:
        log_process(settings.log_file, part=actor_id)
        self._node_id = str(ray.get_runtime_context().get_node_id())
        self._node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._dtype = sampling_dtype(settings)
        runner, self._engine = build_runner(settings, version=version)
        self._loop = RolloutLoop(
            runner, actor_id=actor_id, engine=self._engine, buffer=_RemoteBuffer(buffer), num_groups=num_groups
        )

    async def ready(self) -> Built:
        """What was built, once engine and retriever are."""
        return Built(os.getpid(), self._dtype)

    async def run(self) -> None:
        """Errors are those of `RolloutLoop.run`."""
        await self._loop.run()

    async def stop(self) -> None:
        self._loop.stop()

    async def drain(self) -> None:
        """Lease nothing more; returns when what was begun is finished."""
        await self._loop.drain()

    async def pulse(self) -> ActorPulse:
        return self._loop.pulse(node=self._node, node_id=self._node_id)

    async def update_weights(
        self, version: WeightVersion, proof: WeightProof | None, *buckets: Weights
    ) -> Delivery | None:
        """New weights, in the buckets in which they came; without a proof they stay, and only the version changes."""
        weights = {name: array for bucket in buckets for name, array in bucket.items()}
        update = None if proof is None else WeightUpdate(weights=weights, proof=proof.seen_in(self._dtype))
        return await self._loop.update_weights(version, update)

    async def evaluate(self, questions: Sequence[Question], *, version: WeightVersion) -> list[EpisodeScore]:
        scores = await self._loop.evaluate(questions, version=version)
        return [replace(score, text=None) for score in scores]  # nobody reads it here, and it is most of the bytes

    async def stats(self) -> EngineStats:
        return self._loop.stats()

    async def searches(self) -> RetrieverState:
        return self._loop.searches()


def start_rollout_actor(
    actor_id: str,
    *,
    settings: RolloutSettings,
    version: WeightVersion,
    num_groups: int,
    buffer: RemoteHandle,
    share: Share,
) -> ActorHandle[RolloutActor]:
    """A `RolloutActor` in its own process, which has this share; `run` lets it begin.

    Args:
        version: what the weights in `settings.model_path` are called.
        num_groups: groups that it runs at once.
    """
    remote = ray.remote(RolloutActor).options(name=actor_id, max_concurrency=MAX_CALLS, **share.options)
    handle = remote.remote(actor_id, settings=settings, version=version, num_groups=num_groups, buffer=buffer)
    return cast("ActorHandle[RolloutActor]", handle)
