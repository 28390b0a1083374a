"""Warnings: what in a step's metrics says that the training goes wrong, and what to do about it.

Each warning is told when it begins, not again at every step; `warning/<name>` in the metrics is 1 as long as it lasts.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import rexrag.metrics as keys
from rexrag.errors import counted

Metrics = Mapping[str, float | None]

MAX_LOGPROB_FALL: Final = 1.5
"""Factor by which correct rows may be less likely (in nats a token) than in the steps before."""
_LEAST_FALL: Final = 0.05
_WINDOW: Final = 10
_LEAST_HISTORY: Final = 3
MANY_LOSSES: Final = 3
"""Rollout actors that die within a window of steps."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A bound of one metric. `advice` may name {value} and {bound}."""

    key: str
    metric: str
    bound: float
    is_upper: bool
    advice: str

    def broken_by(self, value: float | None) -> str | None:
        """What to tell where the value is beyond the bound."""
        if value is None or (value <= self.bound if self.is_upper else value >= self.bound):
            return None
        return self.advice.format(value=value, bound=self.bound)


RULES: Final = (
    Rule(
        key=keys.WARNING_ESS,
        metric=keys.WEIGHT_ESS_TARGET,
        bound=0.1,
        is_upper=False,
        advice="the effective sample size of the targets is {value:.2f}, below {bound}: few tokens carry the gradient. "
        "Lower replay.max_staleness or optimizer.learning_rate",
    ),
    Rule(
        key=keys.WARNING_ESS,
        metric=keys.WEIGHT_ESS_PROBE,
        bound=0.1,
        is_upper=False,
        advice="the effective sample size of the probes is {value:.2f}, below {bound}: few tokens carry their "
        "gradient. Lower replay.max_staleness or optimizer.learning_rate; where that of the targets is not low, the "
        'hints are too unlikely for these weights: take method = "rex"',
    ),
    Rule(
        key=keys.WARNING_TRUNCATION,
        metric=keys.WEIGHT_TRUNCATED_SHARE,
        bound=0.1,
        is_upper=True,
        advice="{value:.0%} of the staleness weights were cut to correction.cap, more than {bound:.0%}: rollouts are "
        "too old for the steps that the policy takes. Lower replay.max_staleness or optimizer.learning_rate",
    ),
    Rule(
        key=keys.WARNING_REFLECTING,
        metric=keys.TARGET_REFLECT_RATE,
        bound=0.2,
        is_upper=True,
        advice="{value:.0%} of the targets write a hint by themselves, more than {bound:.0%}: the policy learns the "
        'hints\' words. Set probe.transfer = "hint_free" with probe.filter = "none", or lower probe.rate',
    ),
    Rule(
        key=keys.WARNING_MISMATCH,
        metric=keys.POLICY_MISMATCH_KL,
        bound=0.01,
        is_upper=True,
        advice="engine and learner disagree: mismatch_kl is {value:.3f}, more than {bound}. Set rollout.dtype and "
        'learner.autocast to one precision, "float32" if it stays, and weights.inflight = "recompute"',
    ),
)


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A warning that begins: its metric, what was seen, and what to do."""

    key: str
    text: str


class Alarms:
    """Looks at one step after the other.

    alarms = Alarms()
    flags, begun = alarms.look({"weight/ess_probe": 0.04})    # flags: warning/... -> 0 or 1

    Args:
        by_shares: weights are shares of their question's (`correction.mixture = "normalized"`): that few probes carry
            most is then as it should be, since in a lost question the likeliest way out gets nearly all.
    """

    def __init__(self, *, by_shares: bool = False) -> None:
        self._rules = [rule for rule in RULES if not (by_shares and rule.metric == keys.WEIGHT_ESS_PROBE)]
        self._correct: deque[float] = deque(maxlen=_WINDOW)
        self._replaced: deque[float] = deque([0.0], maxlen=_WINDOW + 1)
        self._lasting: set[str] = set()

    def look(self, metrics: Metrics) -> tuple[dict[str, float], list[Warned]]:
        """Flags of all warnings for this step, and the warnings that it begins."""
        told = [(rule.key, rule.broken_by(metrics.get(rule.metric))) for rule in self._rules]
        told += [
            (keys.WARNING_FORGETTING, self._forgets(metrics)),
            (keys.WARNING_LOSSES, self._loses_actors(metrics)),
            (keys.WARNING_REFUSED, _refuses(metrics)),
        ]
        found: dict[str, str] = {}
        for key, text in told:
            if text is not None:
                found.setdefault(key, text)
        begun = [Warned(key=key, text=text) for key, text in found.items() if key not in self._lasting]
        self._lasting = set(found)
        return {key: float(key in found) for key, _ in told}, begun

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

    def _loses_actors(self, metrics: Metrics) -> str | None:
        replaced = metrics.get(keys.ROLLOUT_REPLACED)
        if replaced is None:
            return None
        self._replaced.append(replaced)
        lost = replaced - self._replaced[0]
        if lost < MANY_LOSSES:
            return None
        return (
            f"{counted(int(lost), 'rollout actor')} died within {counted(len(self._replaced) - 1, 'step')} and had to "
            "be replaced: log.jsonl says of what, and on which node; where it is always the same, take it out"
        )


def _refuses(metrics: Metrics) -> str | None:
    refused = metrics.get(keys.SEARCH_REFUSED) or 0.0
    answered = (metrics.get(keys.TARGET_SEARCHES) or 0.0) * (metrics.get(keys.TARGET_COUNT) or 0.0)
    if refused <= answered:
        return None
    return (
        f"the search server refused {refused:.0f} queries of the step and answered {answered:.0f}: the policy learns "
        "without searching. The samples show its words; correct the server, or lower env.top_k or env.max_turn_tokens"
    )
