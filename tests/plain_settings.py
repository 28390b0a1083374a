"""Settings of the parts as tests begin with them: `loss_settings(train_prefix=True)`.

The parts' settings have no defaults of their own. These are chosen for tests: small, on the CPU, in full precision, and
the paper's weights, in which every part of the correction is at work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rexrag.engine.settings import EngineSettings
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerSettings

_LOSS = LossSettings(
    baseline="joint",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    kl_coef=0.0,
    train_hints=True,
    train_prefix=False,
    preserve=0.0,
    preserve_knee=0.0,
    preserve_rows=16,
)
_CORRECTION = CorrectionSettings(mixture="token", bound="truncate", cap=2.0, low=0.5, high=2.0)
_PROBE = ProbeSettings(rate=0.5, branch="answer", transfer="hinted", filter="hint_logprob")
_OPTIMIZER = OptimizerSettings(
    learning_rate=1e-6, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.99, weight_decay=0.0, max_grad_norm=1.0
)
_LEARNER = LearnerSettings(
    correction=_CORRECTION,
    loss=_LOSS,
    optimizer=_OPTIMIZER,
    probe=_PROBE,
    max_staleness=2,
    max_length=128,
    micro_batch_tokens=4096,
    autocast="float32",
    gradient_checkpointing=False,
    max_bad_steps=3,
)
_ENGINE = EngineSettings(
    max_sequences=8, max_length=64, dtype="float32", inflight="keep", num_threads=None, device="cpu"
)


def loss_settings(**changes: Any) -> LossSettings:  # noqa: ANN401
    return replace(_LOSS, **changes)


def correction_settings(**changes: Any) -> CorrectionSettings:  # noqa: ANN401
    return replace(_CORRECTION, **changes)


def probe_settings(**changes: Any) -> ProbeSettings:  # noqa: ANN401
    return replace(_PROBE, **changes)


def optimizer_settings(**changes: Any) -> OptimizerSettings:  # noqa: ANN401
    return replace(_OPTIMIZER, **changes)


def learner_settings(**changes: Any) -> LearnerSettings:  # noqa: ANN401
    return replace(_LEARNER, **changes)


def engine_settings(**changes: Any) -> EngineSettings:  # noqa: ANN401
    return replace(_ENGINE, **changes)
