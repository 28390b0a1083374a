"""Warnings: what in a step's metrics says that the training goes wrong, and what to do about it.

Each warning is told when it begins, not again at every step; `warning/<name>` in the metrics is 1 as long as it lasts.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import rexrag.metrics as keys

Metrics = Mapping[str, float | None]

MIN_ESS: Final = 0.1
MAX_TRUNCATED_SHARE: Final = 0.1
MAX_REFLECT_RATE: Final = 0.2
MAX_MISMATCH_KL: Final = 0.01
MAX_LOGPROB_FALL: Final = 1.5
"""Factor by which correct rows may be less likely (in nats a token) than in the steps before."""
_LEAST_FALL: Final = 0.05
_WINDOW: Final = 10
_LEAST_HISTORY: Final = 3


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning that begins: its metric, what was seen, and what to do."""

    key: str
    text: str


class Watch:
    """Looks at one step after the other.

    watch = Watch()
    flags, begun = watch.look({"weight/ess_probe": 0.04})    # flags: warning/... -> 0 or 1
    """

    def __init__(self) -> None:
        self._correct: deque[float] = deque(maxlen=_WINDOW)
        self._lasting: set[str] = set()

    def look(self, metrics: Metrics) -> tuple[dict[str, float], list[Warned]]:
        """Flags of all warnings for this step, and the warnings that it begins."""
        rules: dict[str, Callable[[Metrics], str | None]] = {
            keys.WARNING_ESS: _low_ess,
            keys.WARNING_TRUNCATION: _much_truncation,
            keys.WARNING_REFLECTING: _probes_take_over,
            keys.WARNING_FORGETTING: self._forgets,
            keys.WARNING_MISMATCH: _mismatch,
        }
        found = {key: text for key, rule in rules.items() if (text := rule(metrics)) is not None}
        begun = [Warned(key=key, text=text) for key, text in found.items() if key not in self._lasting]
        self._lasting = set(found)
        return {key: float(key in found) for key in rules}, begun

    def _forgets(self, metrics: Metrics) -> str | None:
        now = metrics.get(keys.POLICY_CORRECT_LOGPROB)
        if now is None:
            return None
        before = statistics.median(self._correct) if len(self._correct) >= _LEAST_HISTORY else None
        self._correct.append(now)
        if before is None or now > MAX_LOGPROB_FALL * before or before - now < _LEAST_FALL:
            return None
        return (
            f"tokens of correct rows have a mean log-prob of {now:.2f}, {before:.2f} in the steps before: the policy "
            "moves away from what it did right. Lower optimizer.learning_rate or optimizer.max_grad_norm, or raise "
            "loss.preserve"
        )


def _low_ess(metrics: Metrics) -> str | None:
    for key, whose in ((keys.WEIGHT_ESS_TARGET, "targets"), (keys.WEIGHT_ESS_PROBE, "probes")):
        value = metrics.get(key)
        if value is not None and value < MIN_ESS:
            return (
                f"the effective sample size of the {whose} is {value:.2f}, below {MIN_ESS}: few tokens carry the "
                "gradient. Lower replay.max_staleness or optimizer.learning_rate; where only probes are low, their "
                'hints are too unlikely for exact weights: take method = "escape", or raise correction.floor'
            )
    return None


def _much_truncation(metrics: Metrics) -> str | None:
    value = metrics.get(keys.WEIGHT_TRUNCATED_SHARE)
    if value is None or value <= MAX_TRUNCATED_SHARE:
        return None
    return (
        f"{value:.0%} of the staleness weights were cut to correction.cap, more than {MAX_TRUNCATED_SHARE:.0%}: "
        "rollouts are too old for the steps that the policy takes. Lower replay.max_staleness or "
        "optimizer.learning_rate"
    )


def _probes_take_over(metrics: Metrics) -> str | None:
    value = metrics.get(keys.TARGET_REFLECT_RATE)
    if value is None or value <= MAX_REFLECT_RATE:
        return None
    return (
        f"{value:.0%} of the targets write a hint by themselves, more than {MAX_REFLECT_RATE:.0%}: the policy learns "
        'the hints\' words. Set probe.transfer = "hint_free" with probe.filter = "none", or lower probe.rate'
    )


def _mismatch(metrics: Metrics) -> str | None:
    value = metrics.get(keys.POLICY_MISMATCH_KL)
    if value is None or value <= MAX_MISMATCH_KL:
        return None
    return (
        f"engine and learner disagree: mismatch_kl is {value:.3f}, more than {MAX_MISMATCH_KL}. Set rollout.dtype and "
        'learner.autocast to one precision, "float32" if it stays, and weights.inflight = "recompute"'
    )
