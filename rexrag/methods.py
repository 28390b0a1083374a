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
_PAPER: Final = {**_GRPO, "probe.rate": 0.5, "correction.mixture": "token"}
_MAXRL: Final = {
    **_GRPO,
    "probe.filter": "none",
    "correction.mixture": "normalized",
    "loss.train_prefix": True,
}

METHODS: Final[dict[str, dict[str, object]]] = {
    "grpo": _GRPO,
    "maxrl": _MAXRL,
    "paper": _PAPER,
    "exact": {**_MAXRL, "probe.rate": 0.5, "correction.mixture": "sequence", "loss.baseline": "loo"},
    "rex": {**_MAXRL, "probe.rate": 0.5, "loss.preserve": 1.0, "loss.preserve_knee": 0.5},
}
"""What `method` stands for: dotted key -> value."""

METHOD_ADVICE: Final = {
    "grpo": "Plain GRPO, no probes: where the policy finds right answers by itself now and then.",
    "maxrl": "Maximum-likelihood RL, no probes: as GRPO, with more weight on questions that are seldom right.",
    "paper": "REX-RAG as published: to compare with it.",
    "exact": "Weights that give the on-policy gradient of the reward: where its bias matters more than a dead end.",
    "rex": "Probes corrected for, towards the likelihood of being right, and what was right is kept: in doubt this.",
}
"""When to take which method."""
