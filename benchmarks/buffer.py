"""What one replay buffer holds: ingest, hand-out, control messages, and whether it stays small over a long run.

    python benchmarks/buffer.py --work DIR [--rows 8] [--row-tokens 4096] [--groups 128] [--steps 10000] [--out FILE]

The real buffer in a Ray actor, its log on the disk of DIR, actors in processes of their own that lease groups and
append what was made beforehand. Ceilings of the same run: the same bytes written and synced by one process that does
nothing else, the same bytes and messages taken by a Ray actor that does nothing with them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import psutil
import ray
from machine import origin

from rexrag.arrow import group_to_ipc
from rexrag.buffer.replay_actor import ReplayActor, start_replay_actor
from rexrag.buffer.settings import ReplaySettings
from rexrag.types import (
    EndReason,
    GroupLease,
    Kind,
    LeaseKey,
    Origin,
    Question,
    StepBatch,
    Trajectory,
    TrajectoryGroup,
    WeightVersion,
)

NUM_ACTORS: Final = 256
"""That wait for groups while the messages are counted."""
NUM_CLIENTS: Final = 2
"""Processes that the actors' calls come from."""
TAKE_TOKENS: Final = 5_000_000
LONG_GROUPS: Final = 8
"""Of a step of the long run, small ones."""
SAVE_EVERY: Final = 25
"""Steps between two checkpoints of the long run."""

Figures: TypeAlias = dict[str, object]
Handle: TypeAlias = Any
"""A Ray actor handle: its methods are made at run time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder on the disk that is measured")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=128, help="of a step; all but the long run")
    parser.add_argument("--messages", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    words.work.mkdir(parents=True)
    shape = (words.rows, words.row_tokens)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    found = origin()
    measures: dict[str, Callable[[], Figures]] = {
        "ingest": lambda: ingest(words.work / "ingest", shape=shape, num_groups=words.groups),
        "take": lambda: hand_out(words.work / "take", shape=shape),
        "control": lambda: control(words.work / "control", num_messages=words.messages),
        "long": lambda: asyncio.run(long_run(words.work / "long", num_steps=words.steps)),
    }
    for name, measure in measures.items():
        found[name] = measure()
        print(name, json.dumps(found[name]), flush=True)
    ray.shutdown()
    shutil.rmtree(words.work)
    if words.out is not None:
        words.out.write_text(json.dumps(found, indent=1) + "\n")


class Client:
    """Calls of many actors from one process."""

    def lease(self, buffer: Handle, *, num: int, shape: tuple[int, int]) -> int:
        """Lease groups and make what is to be appended; returns how many there are."""
        leases = ray.get(buffer.lease.remote("a", num=num, held=FIRST, wait_s=0.0))
        self.ready = [(lease.key, group_of(lease, shape=shape)) for lease in leases]
        return len(self.ready)

    def append(self, buffer: Handle, *, at_once: int) -> None:
        """Append all, as many at once as are told of."""
        pending: list[Any] = []
        for key, ipc in self.ready:
            if len(pending) >= at_once:
                _, pending = ray.wait(pending)
            pending.append(buffer.append.remote("a", lease=key, ipc=ipc))
        ray.get(pending)

    def renew(self, buffer: Handle, *, num: int, at_once: int) -> None:
        """Messages as actors send them to keep their leases."""
        progress = {LeaseKey(f"1-{i}", 1): i for i in range(4)}
        pending: list[Any] = []
        for _ in range(num):
            if len(pending) >= at_once:
                _, pending = ray.wait(pending)
            pending.append(buffer.renew.remote("a", progress=progress))
        ray.get(pending)


class Nothing:
    """Takes what a buffer takes, and does nothing: what is left is Ray."""

    async def lease(self, actor_id: str, *, num: int, held: WeightVersion, wait_s: float) -> list[GroupLease]:
        question = make_questions(1)[0]
        return [
            GroupLease(group_id=f"1-{i}", question=question, epoch=0, attempt=0, version=FIRST, grant=1)
            for i in range(num)
        ]

    async def append(self, actor_id: str, *, lease: LeaseKey, ipc: bytes) -> str:
        return "accepted"

    async def renew(self, actor_id: str, *, progress: dict[LeaseKey, int]) -> list[LeaseKey]:
        return []


def ingest(folder: Path, *, shape: tuple[int, int], num_groups: int) -> Figures:
    """Tokens a second that are durable, from two processes; beside the disk's and Ray's own."""
    times = {}
    for name in ("buffer", "nothing"):
        actor = begin(Nothing) if name == "nothing" else start(folder, num_groups=num_groups)
        clients = [begin(Client) for _ in range(NUM_CLIENTS)]
        share = num_groups // NUM_CLIENTS
        ray.get([client.lease.remote(actor, num=share, shape=shape) for client in clients])
        began = time.perf_counter()
        ray.get([client.append.remote(actor, at_once=16) for client in clients])
        times[name] = time.perf_counter() - began
        for part in (actor, *clients):
            ray.kill(part)
    num_tokens = num_groups * shape[0] * shape[1]
    data = group_of(None, shape=shape)
    times["disk"] = disk_seconds(folder / "raw", data=data, num=num_groups)
    rates = {f"{name}_tokens_per_s": round(num_tokens / seconds) for name, seconds in times.items()}
    return {"tokens": num_tokens, "bytes_per_token": round(len(data) / (shape[0] * shape[1]), 1), **rates}


def disk_seconds(path: Path, *, data: bytes, num: int) -> float:
    """To write the data so many times into one file, and sync it once every 16."""
    with path.open("wb", buffering=0) as file:
        began = time.perf_counter()
        for index in range(num):
            file.write(data)
            if index % 16 == 15:
                os.fdatasync(file.fileno())
        os.fdatasync(file.fileno())
        return time.perf_counter() - began


def hand_out(folder: Path, *, shape: tuple[int, int]) -> Figures:
    """From the call to the learner's having the groups of one step."""
    num_groups = -(-TAKE_TOKENS // (shape[0] * shape[1]))
    actor = start(folder, num_groups=num_groups)
    client = begin(Client)
    ray.get(client.lease.remote(actor, num=num_groups, shape=shape))
    ray.get(client.append.remote(actor, at_once=16))
    assert ray.get(actor.assign.remote(1, rho=None, timeout_s=60.0))
    learner = begin(Learner)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        ray.get(learner.step.remote(actor.take.remote(1)))
        times.append(time.perf_counter() - began)
    for part in (actor, client, learner):
        ray.kill(part)
    return {"tokens": num_groups * shape[0] * shape[1], **milliseconds(times[1:])}


class Learner:
    def step(self, batch: StepBatch) -> int:
        return sum(memoryview(stream).nbytes for stream in batch.groups)


def control(folder: Path, *, num_messages: int) -> Figures:
    """Messages a second while actors wait for groups, and how long a call takes meanwhile."""
    rates: Figures = {}
    for name in ("buffer", "nothing"):
        is_buffer = name == "buffer"
        actor = start(folder, num_groups=8) if is_buffer else begin(Nothing)
        clients = [begin(Client) for _ in range(NUM_CLIENTS)]
        if is_buffer:
            ray.get(actor.lease.remote("a", num=8, held=FIRST, wait_s=0.0))
            waiting = [actor.lease.remote(f"{i}", num=1, held=FIRST, wait_s=600.0) for i in range(NUM_ACTORS)]
        ray.get([client.renew.remote(actor, num=100, at_once=32) for client in clients])
        began = time.perf_counter()
        done = [client.renew.remote(actor, num=num_messages // NUM_CLIENTS, at_once=32) for client in clients]
        times = []
        while is_buffer and len(ray.wait(done, num_returns=len(done), timeout=0.02)[0]) < len(done):
            asked = time.perf_counter()
            ray.get(actor.status.remote())
            times.append(time.perf_counter() - asked)
        ray.get(done)
        rates[f"{name}_messages_per_s"] = round(num_messages / (time.perf_counter() - began))
        if is_buffer:
            rates |= {"waiting_actors": len(waiting), **milliseconds(times)}
        for part in (actor, *clients):
            ray.kill(part)
    return rates


async def long_run(folder: Path, *, num_steps: int) -> Figures:
    """Steps of small groups with a checkpoint now and then, in this process: memory and disk on the way."""
    actor = ReplayActor(settings_of(folder, num_groups=LONG_GROUPS, num_questions=1000), resume_step=None)
    await actor.open()
    process, sizes, began = psutil.Process(), [], time.perf_counter()
    for step in range(num_steps):
        version = WeightVersion(incarnation="1", step=step)
        await actor.publish(version)
        leases = await actor.lease("a", num=LONG_GROUPS, held=version, wait_s=0.0)
        streams = [group_of(lease, shape=(2, 200)) for lease in leases]
        await all_of(actor.append, leases, streams)
        assert await actor.assign(step + 1, rho=None, timeout_s=1.0)
        await actor.take(step + 1)
        await actor.outcome(step + 1, applied=True)
        if (step + 1) % SAVE_EVERY == 0 and step > SAVE_EVERY:
            await actor.settle(step + 1 - SAVE_EVERY)
        if (step + 1) % max(1, num_steps // 10) == 0:
            on_disk = sum(path.stat().st_size for path in folder.iterdir())
            sizes.append((step + 1, round(process.memory_info().rss / 2**20), round(on_disk / 2**20, 1)))
    steps, memory, disk = zip(*sizes, strict=True)
    seconds = round(time.perf_counter() - began, 1)
    return {"steps": steps, "memory_mib": memory, "disk_mib": disk, "groups_per_step": LONG_GROUPS, "seconds": seconds}


async def all_of(append: Callable[..., Awaitable[str]], leases: Sequence[GroupLease], streams: Sequence[bytes]) -> None:
    calls = [append("a", lease=lease.key, ipc=ipc) for lease, ipc in zip(leases, streams, strict=True)]
    assert set(await asyncio.gather(*calls)) == {"accepted"}


FIRST: Final = WeightVersion(incarnation="1", step=0)


def start(folder: Path, *, num_groups: int) -> Handle:
    """A buffer in its own process, from which groups can be leased."""
    handle: Any = start_replay_actor(settings_of(folder, num_groups=num_groups, num_questions=1000), resume_step=None)
    ray.get(handle.open.remote())
    ray.get(handle.publish.remote(FIRST))
    return handle


def begin(part: type[object]) -> Handle:
    """An actor in a process of its own."""
    remote: Any = ray.remote(part)
    return remote.remote()


def settings_of(folder: Path, *, num_groups: int, num_questions: int, max_staleness: int = 0) -> ReplaySettings:
    return ReplaySettings(
        folder=folder,
        questions=make_questions(num_questions),
        groups_per_step=num_groups,
        max_staleness=max_staleness,
        seed=0,
        lease_timeout_s=3600.0,
        lease_deadline_s=7200.0,
        max_attempts=2,
        segment_bytes=64 << 20,
        first_step=0,
        num_steps=None,
        refill=False,
        log_file=None,
    )


def make_questions(num: int) -> tuple[Question, ...]:
    return tuple(
        Question(id=f"{i}", data_source="b", question=f"Who is {i}?", golden_answers=("x",)) for i in range(num)
    )


def group_of(lease: GroupLease | None, *, shape: tuple[int, int]) -> bytes:
    """A group of rows of random tokens, for a lease."""
    num_rows, num_tokens = shape
    version = 0 if lease is None else lease.version.step
    draw = np.random.default_rng(0)
    rows = [
        Trajectory(
            kind=Kind.TARGET,
            parent=None,
            branch_point=None,
            hint_id=None,
            reward=float(index % 2),
            em=0.0,
            f1=0.0,
            correct=False,
            end_reason=EndReason.ANSWER,
            num_searches=1,
            num_malformed=0,
            gold_retrieved=None,
            prompt_length=8,
            token_ids=draw.integers(0, 50_000, num_tokens, dtype=np.int32),
            origin=np.asarray([Origin.PROMPT] * 8 + [Origin.POLICY] * (num_tokens - 8), np.uint8),
            behavior_logprob=np.asarray([0.0] * 8 + list(-draw.random(num_tokens - 8)), np.float32),
            policy_version=np.full(num_tokens, version, np.int32),
            action_starts=np.array([8], np.int32),
        )
        for index in range(num_rows)
    ]
    group_id, question = ("1-0", "b/0") if lease is None else (lease.group_id, lease.question.key)
    return group_to_ipc(
        TrajectoryGroup(group_id=group_id, question_id=question, data_source="b", hops=None, trajectories=tuple(rows))
    )


def milliseconds(times: Sequence[float]) -> Figures:
    return {f"p{q}_ms": round(float(np.percentile(times, q)) * 1e3, 1) for q in (50, 99)}


if __name__ == "__main__":
    main()
