"""Where the learner runs: the shell that a Ray actor is made of. What it computes is in `step` and `checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from rexrag.files import folder_bytes
from rexrag.hints import HintPool
from rexrag.learner.checkpoint import load_checkpoint, save_checkpoint
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.loading import Device, load_model, load_tokenizer
from rexrag.model.weight_proof import Canary, WeightProof, WeightUpdate, bit_sum, distance
from rexrag.processes import Share
from rexrag.reporting.log_file import log_process
from rexrag.types import FloatArray, StepBatch, StepResult


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


_BESIDE: Final = "beside"
"""The thread that answers while the main one computes."""


class LearnerActor:
    """One learner rank.

        learner = start_learner(spec, share=Share(threads=2))
        ray.get(learner.ready.remote())
        result = ray.get(learner.step.remote(batch))
        update = learner.export.remote("float32")      # a reference that actors read without a copy

    Methods raise what `LearnerCore` and `checkpoint` raise.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._saving: Path | None = None
        self._scores: tuple[FloatArray, ...] | None = None

    def node_id(self) -> str:
        """The node that it is on."""
        return str(ray.get_runtime_context().get_node_id())

    def ready(self) -> Literal["float32", "bfloat16"]:
        """Build model and optimizer; returns the precision that the learner computes in.

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
        return self._core.precision

    def rho(self) -> float:
        """ρ of the next step (§8)."""
        return self._core.rho

    def step(self, batch: StepBatch) -> StepResult:
        """Train on one step's groups."""
        return self._core.step(batch)

    def export(self, dtype: Literal["float32", "bfloat16"]) -> WeightUpdate:
        """The weights and what they are known by; Ray copies them once, into its object store."""
        weights = self._core.export_weights(dtype=dtype)
        before, scores = self._scores, self._core.score(self._spec.canary)
        self._scores = scores
        is_exact = dtype == self._core.precision == "float32"
        proof = WeightProof(
            canary=self._spec.canary,
            logprobs=scores,
            moved=math.inf if before is None else distance(before, scores),
            bits=bit_sum(weights.values()),
            precision="float32" if is_exact else "bfloat16",
        )
        return WeightUpdate(weights=weights, proof=proof)

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


def ask_progress(learner: ActorHandle[LearnerActor]) -> ObjectRef[tuple[int, int]]:
    """`LearnerActor.progress`, answered while a step or a checkpoint goes on."""
    method: Any = learner.progress
    ref: ObjectRef[tuple[int, int]] = method.options(concurrency_group=_BESIDE).remote()
    return ref
