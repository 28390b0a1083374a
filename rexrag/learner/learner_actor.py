"""Where the learner runs: the shell that a Ray actor is made of. What it computes is in `step` and `checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from rexrag.files import folder_bytes
from rexrag.hints import HintPool
from rexrag.learner.checkpoint import load_checkpoint, save_checkpoint
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.loading import Device, load_model, load_tokenizer
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
        reference: folder of the reference model, needed where `loss.kl_coef` is above 0.
        canary: prompts by whose log-probs engines prove that they hold what was exported.
        log_file: the run's `log.jsonl`.
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
    reference: Path | None = None
    canary: Canary = ()
    log_file: Path | None = None
    bucket_bytes: int = BUCKET_BYTES


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
    """One learner rank.

        learner = start_learner(spec, share=Share(threads=2))
        ray.get(learner.ready.remote())
        result = ray.get(learner.step.remote(batch))
        published = start_export(learner, "float32", num_buckets=1)     # references that actors read without a copy

    Methods raise what `LearnerCore` and `checkpoint` raise.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._saving: Path | None = None
        self._scores: tuple[FloatArray, ...] | None = None

    def node_id(self) -> str:
        """The node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def ready(self) -> Loaded:
        """Build model and optimizer.

        Not done in the constructor, whose errors Ray hands on as text alone.
        """
        spec = self._spec
        log_process(spec.log_file, part="learner")
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        resumed = load_checkpoint(spec.checkpoint) if spec.checkpoint is not None else None
        device = torch.device(spec.device)
        model = load_model(spec.checkpoint or spec.model, dtype="float32")
        reference = load_model(spec.reference, dtype="float32") if spec.reference is not None else None
        self._tokenizer = load_tokenizer(spec.model)
        self._core = LearnerCore(
            model.to(device),  # type: ignore[arg-type]
            settings=spec.settings,
            hints=HintPool(spec.hints, kept=spec.kept),
            evidence_folder=spec.evidence_folder,
            reference=reference.to(device) if reference is not None else None,  # type: ignore[arg-type]
        )
        if resumed is not None:
            self._core.load_trainer_state(resumed)
        self._buckets = in_buckets(self._core.weight_sizes, most_bytes=spec.bucket_bytes)
        return Loaded(self._core.precision, len(self._buckets))

    def rho(self) -> float:
        """ρ of the next step (§8)."""
        return self._core.rho

    def step(self, batch: StepBatch) -> StepResult:
        """Train on one step's groups."""
        return self._core.step(batch)

    def export(self, dtype: Precision) -> Iterator[Weights | WeightProof]:
        """The weights bucket by bucket, then what they are known by; Ray copies each once, into its object store."""
        bits = 0
        for names in self._buckets:
            weights = self._core.export_weights(names, dtype=dtype)
            bits = (bits + bit_sum(weights.values())) % MODULUS
            yield weights
        before, scores = self._scores, self._core.score(self._spec.canary)
        self._scores = scores
        is_exact = dtype == self._core.precision == "float32"
        yield WeightProof(
            canary=self._spec.canary,
            logprobs=scores,
            moved=math.inf if before is None else distance(before, scores),
            bits=bits,
            dtype=dtype,
            precision="float32" if is_exact else "bfloat16",
        )

    def save(self, folder: Path) -> Path:
        """Write the checkpoint of the current step under `folder`; returns its folder."""
        self._saving = folder
        return save_checkpoint(
            folder,
            model=self._core.model,
            tokenizer=self._tokenizer,
            trainer_state=self._core.trainer_state(),
        )

    def progress(self) -> tuple[int, int]:
        """What grows while a step or a checkpoint goes on: passes of the model, bytes of checkpoints on disk."""
        saved = 0 if self._saving is None else folder_bytes(self._saving)
        return self._core.num_passes, saved


def start_learner(spec: LearnerSpec, *, share: Share) -> ActorHandle[LearnerActor]:
    """A `LearnerActor` in its own process, which has this share."""
    options: dict[str, Any] = {**share.options, "concurrency_groups": {_BESIDE: 1}}
    remote: Any = ray.remote(**options)
    return cast("ActorHandle[LearnerActor]", remote(LearnerActor).remote(spec))


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
