"""A learner of several ranks computes what one process does: real processes, FSDP2 over gloo."""

from __future__ import annotations

import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pytest
import ray
import torch.distributed as dist
import torch.multiprocessing as mp
from learner_builders import (
    POOL,
    core,
    learner_spec,
    small_model,
    tiny_model,
)
from learner_builders import (
    mixed_batch as batch,
)
from plain_settings import correction_settings, learner_settings, loss_settings, optimizer_settings, probe_settings
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config

import rexrag.metrics as keys
from rexrag.errors import ModelError, PartDiedError
from rexrag.learner.checkpoint import COMMIT, load_checkpoint
from rexrag.learner.learner_actor import LearnerActor, Published, start_export, start_learner
from rexrag.learner.ranks import LOOPBACK, Meeting, Ranks, join, open_meeting
from rexrag.learner.step import LearnerCore
from rexrag.model.adapters import AdapterSettings, add_adapters
from rexrag.model.sharding import shard_model
from rexrag.processes import Share
from rexrag.run.remote import call
from rexrag.types import FloatArray, StepResult

T = TypeVar("T")
Weights = Mapping[str, npt.NDArray[np.generic]]

pytestmark = pytest.mark.timeout(900)

BOUND_S: Final = 400.0
CANARY: Final = ((1, 2, 3, 4), (5, 6, 7))
OPTIMIZER: Final = optimizer_settings(learning_rate=1e-3, warmup_steps=3, weight_decay=0.01)
REX: Final = learner_settings(
    optimizer=OPTIMIZER,
    probe=probe_settings(filter="none"),
    correction=correction_settings(mixture="normalized"),
    loss=loss_settings(train_prefix=True, preserve=1.0, preserve_knee=0.5),
    micro_batch_tokens=40,
)
EXACT: Final = replace(
    REX,
    correction=correction_settings(mixture="sequence"),
    loss=loss_settings(train_prefix=True),
    gradient_checkpointing=True,
)
WITH_KL: Final = learner_settings(optimizer=OPTIMIZER, loss=loss_settings(kl_coef=0.1), micro_batch_tokens=40)
CASES: Final = {
    "rex": REX,
    "exact, activations made again": EXACT,
    "token, with KL, untied": WITH_KL,
    "adapters, with KL, activations made again": replace(
        REX, loss=replace(REX.loss, kl_coef=0.1), gradient_checkpointing=True
    ),
}
ADAPTERS: Final = AdapterSettings(rank=2, alpha=32)
NUM_STEPS: Final = 4
BROKEN_STEP: Final = 3
UNEQUAL_BY_NATURE: Final = {keys.TIME_STEP, keys.TIME_UPDATE, keys.LEARNER_TOKENS_PER_S}
BY_PACKING: Final = {keys.LEARNER_MICRO_BATCHES, keys.LEARNER_SHARED_SHARE}


def model_of(case: str) -> PreTrainedModel:
    """With a tied head, or as larger models are: one of its own, biases in attention."""
    if "untied" not in case:
        model = tiny_model()
        if "adapters" in case:
            add_adapters(model, ADAPTERS)
        return model
    return small_model(Qwen2Config, max_position_embeddings=256, tie_word_embeddings=False)


def needs_reference(case: str) -> bool:
    """With adapters it is the model without them."""
    return "KL" in case and "adapters" not in case


@dataclass(frozen=True)
class Outcome:
    """Of some steps: their results, and the weights and the canary's log-probs after them."""

    results: Sequence[StepResult]
    weights: Weights
    scores: Sequence[FloatArray]


def assert_same_result(result: StepResult, expected: StepResult) -> None:
    assert (result.step, result.applied, result.updated) == (expected.step, expected.applied, expected.updated)
    assert result.metrics.keys() == expected.metrics.keys()
    for key, value in expected.metrics.items():
        if key not in UNEQUAL_BY_NATURE | BY_PACKING:
            close = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert result.metrics[key] == close, key
    for name, values in expected.histograms.items():
        assert sorted(result.histograms[name]) == pytest.approx(sorted(values), rel=1e-3), name


def assert_same_weights(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        difference = weights[name].astype(np.float64) - value.astype(np.float64)
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(value.astype(np.float64)), name


def outcome_of(learner: LearnerCore, *, breaks: bool) -> Outcome:
    """Of `NUM_STEPS` steps, in one of which the second pass of a process that `breaks` is not finite."""
    passes = 0

    def break_it(head: nn.Module, inputs: object, logits: Tensor) -> Tensor:
        nonlocal passes
        passes += logits.requires_grad
        return logits * math.nan if passes == 2 else logits

    results = []
    for step in range(1, NUM_STEPS + 1):
        passes = 0 if breaks and step == BROKEN_STEP else 10
        head: nn.Module = learner.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        hook = head.register_forward_hook(break_it)
        results.append(learner.step(batch(step)))
        hook.remove()
    weights = learner.export_weights(learner.weight_sizes, dtype="float32")
    return Outcome(results, weights, learner.score(CANARY))


def run_rank(rank: int, meeting: Meeting, folder: Path) -> None:
    """All cases in a process of their own; what they came to goes into a file."""
    ranks = join(meeting, rank=rank, device="cpu")

    def sharded(model: Any) -> Any:  # noqa: ANN401
        return shard_model(model, num_ranks=ranks.num, device=model.device)

    outcomes = {}
    for name, settings in CASES.items():
        learner = LearnerCore(
            sharded(model_of(name)),
            settings=settings,
            hints=POOL,
            evidence_folder=folder,
            reference=sharded(model_of(name)) if needs_reference(name) else None,
            ranks=ranks,
        )
        held = sum(shard.nbytes for shard in map(local_of, learner.model.parameters()))
        assert held < 0.6 * sum(learner.weight_sizes.values()), "a rank has its part of the weights, between steps"
        outcomes[name] = outcome_of(learner, breaks=rank == 1)
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(outcomes))
    dist.destroy_process_group()


def local_of(parameter: Any) -> Tensor:  # noqa: ANN401
    local: Tensor = parameter.to_local()
    return local


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """By rank and case, of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    meeting, store = open_meeting(num_ranks=2, host=LOOPBACK, timeout_s=BOUND_S)
    processes = mp.spawn(run_rank, args=(meeting, folder), nprocs=2, join=False)  # type: ignore[attr-defined, no-untyped-call]
    while not processes.join(timeout=BOUND_S):
        pass
    del store
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_as_one(case: str, outcomes: list[dict[str, Outcome]], tmp_path: Path) -> None:
    """In the third step a pass of the second rank alone is not finite: all skip it, and the fourth is as it should."""
    settings = CASES[case]
    reference = model_of(case) if needs_reference(case) else None
    one = core(tmp_path, settings=settings, model=model_of(case), reference=reference)
    expected, first, second = outcome_of(one, breaks=True), outcomes[0][case], outcomes[1][case]
    assert [result.updated for result in first.results] == [True, True, False, True]
    for ours, theirs in zip(first.results, expected.results, strict=True):
        if ours.updated:
            assert_same_result(ours, theirs)
    assert_same_weights(first.weights, expected.weights)
    assert not second.weights, "the first rank alone hands them on"
    for rank in (first, second):
        assert np.concatenate(rank.scores) == pytest.approx(np.concatenate(expected.scores), abs=1e-3)
    assert second.results[-1].metrics[keys.LOSS_TOTAL] == first.results[-1].metrics[keys.LOSS_TOTAL]


Start = Callable[..., ActorHandle[LearnerActor]]


@pytest.fixture
def start(ray_session: None, tmp_path: Path) -> Iterator[Start]:
    """What it has started ends with the test."""
    started: list[ActorHandle[LearnerActor]] = []

    def begin(**fields: object) -> ActorHandle[LearnerActor]:
        spec = learner_spec(tmp_path, settings=REX, canary=CANARY, rank_timeout_s=BOUND_S, **fields)
        learner = start_learner(spec, share=Share(threads=1))
        started.append(learner)
        assert wait(call(learner, LearnerActor.ready)).num_buckets == 1
        return learner

    yield begin
    for learner in started:
        ray.kill(learner)


def wait(ref: ObjectRef[T]) -> T:
    value: T = ray.get(ref, timeout=BOUND_S)
    return value


def exported(learner: ActorHandle[LearnerActor]) -> Weights:
    published: Published = start_export(learner, "float32", num_buckets=1)
    assert len(wait(published.proof).logprobs) == len(CANARY)
    return wait(published.buckets[0])


def test_a_checkpoint_goes_from_some_ranks_to_others(start: Start, tmp_path: Path) -> None:
    one = core(tmp_path, settings=REX)
    two = start(num_ranks=2)
    for step in (1, 2):
        assert_same_result(wait(call(two, LearnerActor.step, batch(step))), one.step(batch(step)))
    saved = wait(call(two, LearnerActor.save, tmp_path / "checkpoints"))
    ray.kill(two)
    assert (saved / COMMIT).is_file()
    moments = one.trainer_state().optimizer
    assert {name: moment.shape for name, moment in load_checkpoint(saved).optimizer.items()} == {
        name: moment.shape for name, moment in moments.items()
    }
    expected = one.step(batch(3))
    alone = LearnerActor(learner_spec(tmp_path, settings=REX, model=saved, checkpoint=saved), share=Share(threads=1))
    alone.ready()
    assert_same_result(alone.step(batch(3)), expected)
    three = start(num_ranks=3, model=saved, checkpoint=saved)
    assert_same_result(wait(call(three, LearnerActor.step, batch(3))), expected)
    assert_same_weights(exported(three), one.export_weights(one.weight_sizes, dtype="float32"))
    kill_a_rank(three)
    with pytest.raises(RayTaskError) as raised:
        wait(call(three, LearnerActor.step, batch(4)))
    assert isinstance(raised.value.cause, PartDiedError)
    assert "a rank of the learner died" in str(raised.value.cause)


def test_adapters_go_from_some_ranks_to_others(start: Start, tmp_path: Path) -> None:
    two = start(num_ranks=2, adapters=ADAPTERS)
    for step in (1, 2):
        wait(call(two, LearnerActor.step, batch(step)))
    saved = wait(call(two, LearnerActor.save, tmp_path / "checkpoints"))
    expected = wait(call(two, LearnerActor.step, batch(3)))
    weights = exported(two)
    ray.kill(two)
    fields = {"adapters": ADAPTERS, "checkpoint": saved}
    alone = LearnerActor(learner_spec(tmp_path, settings=REX, **fields), share=Share(threads=1))
    alone.ready()
    assert_same_result(alone.step(batch(3)), expected)
    again = start(num_ranks=2, **fields)
    assert_same_result(wait(call(again, LearnerActor.step, batch(3))), expected)
    assert_same_weights(exported(again), weights)


def kill_a_rank(learner: ActorHandle[LearnerActor]) -> None:
    """The last one's process, from outside: the others fail for it."""

    def pid_of(actor: LearnerActor) -> int:
        assert actor._others is not None
        last: Any = actor._others[-1]
        return cast("int", ray.get(last.__ray_call__.remote(lambda _: os.getpid())))

    first: Any = learner
    os.kill(ray.get(first.__ray_call__.remote(pid_of), timeout=BOUND_S), signal.SIGKILL)


def test_what_a_rank_fails_with_is_heard_before_its_collective_is_missed(ray_session: None, tmp_path: Path) -> None:
    """Asked for its progress while it loads, the first rank tells the cause, and not what the others make of it."""

    def fail(error: Exception) -> None:
        raise error

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(fail)
    spec = learner_spec(tmp_path, settings=REX, num_ranks=3)
    first = LearnerActor(spec, share=Share(threads=1))
    assert first.progress() == (0, 0), "it has nothing to wait for yet"
    first._pending = [remote.remote(RuntimeError("connection closed by peer")), remote.remote(ModelError("no model"))]
    ray.wait(first._pending, num_returns=2, timeout=BOUND_S)
    with pytest.raises(ModelError, match="no model"):
        first.progress()


def test_rows_are_shared_out_in_stretches_of_like_cost() -> None:
    group = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
    ranks = [Ranks(rank=rank, num=3, group=group) for rank in range(3)]
    costs = [30, 10, 10, 10, 60, 5, 5, 30]
    assert [range(*rank.part(costs).indices(8)) for rank in ranks] == [range(3), range(3, 5), range(5, 8)]
    assert [range(*rank.part([7]).indices(1)) for rank in ranks] == [range(0), range(1), range(1, 1)]
    assert Ranks().part(costs) == slice(0, 8)
    assert Ranks().part([]) == slice(0, 0)
