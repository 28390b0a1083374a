"""Where the learner runs: the shell that a Ray actor is made of. What it computes is in `step` and `checkpoint`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import PickleBuffer
from typing import Any, Final, NamedTuple, TypeVar, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedModel

from rexrag.errors import PartDiedError, RexragError, RunFailure
from rexrag.files import folder_bytes
from rexrag.hints import HintPool
from rexrag.learner.checkpoint import load_checkpoint, save_checkpoint
from rexrag.learner.ranks import LOOPBACK, Meeting, Ranks, join, open_meeting
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.adapters import AdapterSettings, add_adapters, check_base
from rexrag.model.loading import Device, load_model, load_tokenizer
from rexrag.model.sharding import shard_model
from rexrag.model.weight_proof import (
    MODULUS,
    Canary,
    Precision,
    WeightProof,
    Weights,
    bit_sum,
    distance,
    in_buckets,
)
from rexrag.processes import Share
from rexrag.reporting.log_file import log_process
from rexrag.types import FloatArray, StepBatch, StepResult

BUCKET_BYTES: Final = 512 << 20
"""Most bytes, in float32, of the weights that travel as one object: it bounds what the learner holds twice, and a large
model comes over several connections at once."""


@dataclass(frozen=True, kw_only=True)
class LearnerSpec:
    """What a learner process is built from.

    Attributes:
        model: model folder of step 0; its tokenizer goes into every checkpoint.
        hints, kept: token ids of the run's hint pool, and how many of each stay when it is taken out.
        threads: torch threads.
        device: where the model is.
        seed: of torch's generator, where no checkpoint sets it.
        evidence_folder: where a run that fails on non-finite values leaves its last batch.
        checkpoint: folder to go on from; None begins at step 0.
        adapters: to train in place of the weights of `model`, which a checkpoint does not replace then.
        reference: folder of the reference model, needed where `loss.kl_coef` is above 0 and there are no adapters.
        canary: prompts by whose log-probs engines prove that they hold what was exported.
        log_file: the run's `log.jsonl`.
        num_ranks: processes that hold the model together; each has the actor's share.
        rank_timeout_s: how long a rank waits for another one.
        bucket_bytes: most bytes, in float32, of the weights that travel as one object.
    """

    model: Path
    settings: LearnerSettings
    hints: Sequence[Sequence[int]]
    kept: Sequence[int]
    threads: int
    device: Device
    seed: int
    evidence_folder: Path
    checkpoint: Path | None = None
    adapters: AdapterSettings | None = None
    reference: Path | None = None
    canary: Canary = ()
    log_file: Path | None = None
    num_ranks: int = 1
    rank_timeout_s: float = 900.0
    bucket_bytes: int = BUCKET_BYTES


T = TypeVar("T")

_LAST_WORDS_S: Final = 60.0
"""How long a rank that a collective has failed waits to hear why: Ray may take seconds to tell of a death."""
_NUM_ADDERS: Final = 4
"""Threads that add up the bits of a version while Ray copies it: numpy adds with one, a second for 10⁹ weights."""
_BESIDE: Final = "beside"
"""The thread that answers while the main one computes."""


class Loaded(NamedTuple):
    """A learner that is ready: the precision that it computes in, and in how many buckets its weights travel."""

    precision: Precision
    num_buckets: int


class Published(NamedTuple):
    """A version on its way: the weights in buckets, and their proof; there before it is made."""

    proof: ObjectRef[WeightProof]
    buckets: tuple[ObjectRef[Weights], ...]


class LearnerActor:
    """The first rank of the learner, which has the others do as it does.

        learner = start_learner(spec, share=Share(threads=2))
        ray.get(learner.ready.remote())
        result = ray.get(learner.step.remote(batch))
        published = start_export(learner, "float32", num_buckets=1)     # references that actors read without a copy

    Methods raise what `LearnerCore` and `checkpoint` raise, and `PartDiedError` where another rank dies.
    """

    def __init__(self, spec: LearnerSpec, *, share: Share, rank: int = 0, places: PlacementGroup | None = None) -> None:
        """
        Args:
            share: that another rank gets, too.
            places: kept for all ranks; None: they go wherever Ray puts them.
        """
        self._spec = spec
        self._share = share
        self._rank = rank
        self._places = places
        self._others: list[ActorHandle[LearnerActor]] | None = None
        self._pending: list[ObjectRef[None]] = []
        self._core: LearnerCore | None = None
        self._saving: Path | None = None
        self._scores: tuple[FloatArray, ...] | None = None

    def node_ids(self) -> list[str]:
        """Its node, then those of the other ranks: all have a place then."""
        others = _values_of(self._call_others("node_ids"))
        return [str(ray.get_runtime_context().get_node_id()), *(node for nodes in others for node in nodes)]

    def ready(self, meeting: Meeting | None = None) -> Loaded:
        """Build model and optimizer.

        Not done in the constructor, whose errors Ray hands on as text alone.

        Args:
            meeting: where the first rank waits for this one.
        """
        spec = self._spec
        log_process(spec.log_file, part=f"learner-{self._rank}" if self._rank else "learner")
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        if spec.num_ranks > 1 and self._rank == 0:
            meeting, self._store = open_meeting(
                num_ranks=spec.num_ranks, host=self._host(), timeout_s=spec.rank_timeout_s
            )
        with self._with_others("ready", meeting):
            return self._load(meeting)

    def _load(self, meeting: Meeting | None) -> Loaded:
        spec = self._spec
        ranks = Ranks()
        if meeting is not None:
            store = self._store if self._rank == 0 else None
            host = meeting.host if meeting.host == LOOPBACK else _own_address()
            ranks = join(meeting, rank=self._rank, device=spec.device, host=host, store=store)
        resumed = None
        if spec.checkpoint is not None:  # one rank looks at each byte for all of them
            resumed = load_checkpoint(spec.checkpoint, verify=self._rank == 0)
        self._tokenizer = load_tokenizer(spec.model)
        core = LearnerCore(
            self._placed(self._policy()),
            settings=spec.settings,
            hints=HintPool(spec.hints, kept=spec.kept),
            evidence_folder=spec.evidence_folder,
            reference=None if spec.reference is None else self._placed(load_model(spec.reference, dtype="float32")),
            ranks=ranks,
        )
        if resumed is not None:
            core.load_trainer_state(resumed)
            if spec.checkpoint is not None and spec.adapters is not None:
                check_base(core.model, spec.checkpoint)
        self._core = core
        self._buckets = in_buckets(core.weight_sizes, most_bytes=spec.bucket_bytes)
        return Loaded(core.precision, len(self._buckets))

    @property
    def _ready_core(self) -> LearnerCore:
        assert self._core is not None, "it is ready"
        return self._core

    def _policy(self) -> PreTrainedModel:
        spec = self._spec
        if spec.adapters is None:
            return load_model(spec.checkpoint or spec.model, dtype="float32")
        model = load_model(spec.model, dtype="float32")
        add_adapters(model, spec.adapters)
        return model

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        device = torch.device(self._spec.device)
        if self._spec.num_ranks > 1:
            return shard_model(model, num_ranks=self._spec.num_ranks, device=device)
        return cast("PreTrainedModel", model.to(device))  # type: ignore[arg-type]

    def rho(self) -> float:
        """ρ of the next step (§8)."""
        return self._ready_core.rho

    def step(self, batch: StepBatch) -> StepResult:
        """Train on one step's groups."""
        # Ray gives these as views, and passes them on without another copy only as such buffers.
        groups = tuple(PickleBuffer(memoryview(group)) for group in batch.groups)
        with self._with_others("step", replace(batch, groups=groups)):
            return self._ready_core.step(batch)

    def export(self, dtype: Precision) -> Iterator[Weights | WeightProof]:
        """The weights bucket by bucket, then what they are known by; Ray copies each once, into its object store."""
        core = self._ready_core
        with self._with_others("export", dtype), ThreadPoolExecutor(_NUM_ADDERS) as adders:
            bits, adding = 0, list[Future[int]]()
            for names in self._buckets:
                weights = core.export_weights(names, dtype=dtype)
                bits += sum(future.result() for future in adding)  # a bucket at a time is kept for it
                adding = [adders.submit(bit_sum, [array]) for array in weights.values()]
                yield weights
            before, scores = self._scores, core.score(self._spec.canary)
            bits += sum(future.result() for future in adding)
        self._scores = scores
        is_exact = dtype == core.precision == "float32"
        yield WeightProof(
            canary=self._spec.canary,
            logprobs=scores,
            moved=math.inf if before is None else distance(before, scores),
            bits=bits % MODULUS,
            dtype=dtype,
            precision="float32" if is_exact else "bfloat16",
        )

    def save(self, folder: Path) -> Path:
        """Write the checkpoint of the current step under `folder`; returns its folder."""
        self._saving = folder
        core = self._ready_core
        with self._with_others("save", folder):
            weights, state = core.stored_weights(), core.trainer_state()
        if self._rank:
            return folder
        return save_checkpoint(
            folder, model=core.model, tokenizer=self._tokenizer, trainer_state=state, weights=weights
        )

    def follow(self, name: str, argument: object) -> None:
        """What the first rank does, for what it changes here."""
        made = getattr(self, name)(argument)
        if isinstance(made, Iterator):
            deque(made, maxlen=0)

    def progress(self) -> tuple[int, int]:
        """What grows while a step or a checkpoint goes on: passes of the model, bytes of checkpoints on disk.

        Raises:
            RexragError: another rank has failed, for which this one would wait.
        """
        _values_of(_ended(self._pending))
        saved = 0 if self._saving is None else folder_bytes(self._saving)
        return 0 if self._core is None else self._core.num_passes, saved

    @contextmanager
    def _with_others(self, name: str, argument: object) -> Iterator[None]:
        """The other ranks do the same meanwhile; nothing to do where there are none, or in one of them."""
        self._pending = self._call_others("follow", name, argument)
        try:
            yield
            _values_of(self._pending)
        except RuntimeError:
            # What one rank fails with the others see as a collective that does not come about.
            _values_of(_ended(self._pending, timeout_s=_LAST_WORDS_S))
            raise
        finally:
            self._pending = []

    def _call_others(self, method: str, *arguments: object) -> list[ObjectRef[Any]]:
        if self._rank or self._spec.num_ranks == 1:
            return []
        if self._others is None:
            self._others = self._started_others()
        shared = [ray.put(argument) for argument in arguments]
        return [getattr(other, method).remote(*shared) for other in self._others]

    def _started_others(self) -> list[ActorHandle[LearnerActor]]:
        """They end with this one, whose children they are."""
        return [
            _start(self._spec, share=self._share, rank=rank, places=self._places)
            for rank in range(1, self._spec.num_ranks)
        ]

    def _host(self) -> str:
        """Where the other ranks find this one: nobody else's business where all are on this machine."""
        return LOOPBACK if len(set(self.node_ids())) == 1 else _own_address()


def _own_address() -> str:
    """Of this node, as Ray knows it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _values_of(refs: Sequence[ObjectRef[T]]) -> list[T]:
    """What other ranks came to; what one failed with is raised, before what the others have failed with for it."""
    values, errors = [], list[RexragError]()
    for ref in refs:
        try:
            values.append(ray.get(ref))
        except RayTaskError as error:
            known = error.cause if isinstance(error.cause, RexragError) else None
            errors.append(known or RunFailure(f"a rank of the learner failed: {error.cause!r}"))
        except RayError as error:  # it died, its node did, or it was killed for its memory
            errors.append(PartDiedError(f"a rank of the learner died: {error}"))
    if errors:
        raise min(errors, key=lambda error: type(error) is RunFailure)
    return values


def _ended(refs: Sequence[ObjectRef[T]], *, timeout_s: float = 0.0) -> list[ObjectRef[T]]:
    return ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else []


def start_learner(spec: LearnerSpec, *, share: Share) -> ActorHandle[LearnerActor]:
    """A `LearnerActor` in its own process, which has this share; each of its other ranks has as much.

    Where they reserve anything, all get their places at once, on as few nodes as have room.
    """
    places = None
    if spec.num_ranks > 1 and share.bundle:
        places = placement_group([share.bundle] * spec.num_ranks, strategy="PACK")
    return _start(spec, share=share, rank=0, places=places)


def _start(spec: LearnerSpec, *, share: Share, rank: int, places: PlacementGroup | None) -> ActorHandle[LearnerActor]:
    options: dict[str, Any] = {**share.options, "concurrency_groups": {_BESIDE: 1}}
    if places is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=rank)
    remote: Any = ray.remote(**options)
    return cast("ActorHandle[LearnerActor]", remote(LearnerActor).remote(spec, share=share, rank=rank, places=places))


def start_export(learner: ActorHandle[LearnerActor], dtype: Precision, *, num_buckets: int) -> Published:
    """`LearnerActor.export`, of which whoever calls it owns what comes: it outlives the learner."""
    method: Any = learner.export
    *buckets, proof = method.options(num_returns=num_buckets + 1).remote(dtype)
    return Published(proof, tuple(buckets))


def ask_progress(learner: ActorHandle[LearnerActor]) -> ObjectRef[tuple[int, int]]:
    """`LearnerActor.progress`, answered while a step or a checkpoint goes on."""
    method: Any = learner.progress
    ref: ObjectRef[tuple[int, int]] = method.options(concurrency_group=_BESIDE).remote()
    return ref
