"""What `method` stands for: vetted sets of switches, which single keys override."""

from __future__ import annotations

from typing import Final

_GRPO: Final[dict[str, object]] = {
    "probe.rate": 0.0,
    "probe.transfer": "hinted",
    "probe.dead_end": "rollout",
    "probe.filter": "hint_logprob",
    "correction.mixture": "none",
    "loss.baseline": "joint",
    "loss.train_prefix": False,
    "loss.preserve": 0.0,
    "loss.preserve_knee": 0.0,
}
_REX: Final = {**_GRPO, "probe.rate": 0.5, "correction.mixture": "token"}

METHODS: Final[dict[str, dict[str, object]]] = {
    "grpo": _GRPO,
    "rex": _REX,
    "exact": {
        **_REX,
        "probe.filter": "none",
        "correction.mixture": "sequence",
        "loss.baseline": "loo",
        "loss.train_prefix": True,
    },
    "escape": {
        **_REX,
        "probe.dead_end": "group",
        "correction.mixture": "none",
        "loss.preserve": 1.0,
        "loss.preserve_knee": 0.5,
    },
}
"""What `method` stands for: dotted key -> value."""

METHOD_ADVICE: Final = {
    "grpo": "Plain GRPO, no probes: where the policy finds right answers by itself now and then.",
    "rex": "REX-RAG as published: to compare with it.",
    "exact": "Weights that give the on-policy gradient: where bias matters more than getting out of a dead end.",
    "escape": "Probes at full weight, and what was right is kept: out of dead ends; also where none is known.",
}
"""When to take which method."""
