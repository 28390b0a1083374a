"""What a run says of itself to those who ask from outside: `rexrag status`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ActorReport:
    """A rollout actor. `version`: the step of the weights that it holds; `silent_s`: seconds without a token though
    it has work."""

    actor_id: str
    state: str
    node: str | None
    version: int | None
    num_groups: int
    num_requests: int
    tokens_per_s: float | None
    age_s: float
    silent_s: float


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at a moment.

    Attributes:
        stage: what it is about, such as "training" or "evaluating 40 dev questions at step 8".
        waiting: who waits for whom; None where nothing is waited for. waiting_s: for how long, seconds.
        metrics: of the last step, by their tags.
        evaluations: the last EM of each split, with its step.
        num_wanted: rollout actors that were asked for.
        buffer: counts of groups, None until the buffer has told.
        time: when this was said, seconds since 1970.
    """

    name: str
    run_folder: str
    stage: str
    step: int
    num_steps: int
    waiting: str | None
    waiting_s: float
    metrics: Mapping[str, float | None]
    evaluations: Mapping[str, Mapping[str, float]]
    num_wanted: int
    actors: tuple[ActorReport, ...]
    buffer: Mapping[str, object] | None
    retriever: str
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, object]:
        """Plain values, with `age_s`: seconds since the run said so."""
        return {**dataclasses.asdict(self), "age_s": round(time.time() - self.time, 1)}
