"""What a rollout needs of a generation engine: token ids in, token ids with log-probs and versions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rexrag.errors import RexragError
from rexrag.types import WeightVersion

Finish = Literal["stop", "eos", "length"]


class EngineClosedError(RexragError):
    """The engine was closed before the generation ended."""


class TokenText(Protocol):
    """What an engine needs of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One continuation.

    Attributes:
        prompt_ids: all tokens so far; what the engine has cached of them under the same salt is not computed again.
        max_tokens: bound of sampled tokens, at least 1.
        stop: the first token whose text completes one of these strings ends the generation and is kept whole.
        greedy: argmax in place of sampling at temperature 1. Nothing else changes the distribution.
        seed: seed of the draws; the i-th sampled token's draw depends on (seed, i) alone.
        cache_salt: prefix entries are only shared between requests of one salt.
        score_from: log-probs of prompt_ids[score_from:] come back as `scores`, from the same prefill; None: no scores.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    stop: tuple[str, ...] = ()
    greedy: bool = False
    seed: int = 0
    cache_salt: str = ""
    score_from: int | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was sampled, under which version each token was, and why it ended.

    `logprobs` are those of the distribution that was really sampled from (the argmax's when greedy).
    An end-of-text token is kept and gives `eos`.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: Finish
    scores: list[float] = field(default_factory=list)
    score_versions: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine's start; rates are differences of two of them.

    Attributes:
        running, waiting: requests at the moment.
        forward_s: seconds spent in passes.
        cache_use: share of the key-value cache that running sequences hold, 0 to 1.
        preemptions: times that a running sequence lost its cache for want of room, or to new weights.
    """

    sampled_tokens: int
    prefilled_tokens: int
    reused_tokens: int
    running: int
    waiting: int
    forward_s: float
    cache_use: float = 0.0
    preemptions: int = 0


class Engine(Protocol):
    """A generation engine inside one process. All methods are called from one event loop."""

    @property
    def version(self) -> WeightVersion:
        """The version whose weights are in use."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one continuation.

        Raises:
            ValueError: the prompt is empty, or does not fit the engine's context with `max_tokens`.
            EnginePassError: the pass that computed it failed; so did all else that was in it.
            EngineBrokenError: no further pass will succeed; whoever owns the engine builds another.
        """

    async def update_weights(
        self, version: WeightVersion, weights: Mapping[str, npt.NDArray[np.generic]] | None
    ) -> float:
        """Swap the weights between two forward passes; returns once the new ones are in use.

        Returns:
            Seconds between these two passes, in which nothing was generated.

        None: the version's weights are those that the engine holds, whose step changed nothing.

        Running sequences go on (`keep`) or are prefilled again first (`recompute`), see algorithm §3.
        """

    async def bit_sum(self) -> int | None:
        """`rexrag.model.weight_proof.bit_sum` of the weights that are in use, in the precision that they are kept in.

        None: they lie in a form in which their bits cannot be read.
        """

    def release(self, cache_salt: str) -> None:
        """Forget the prefix entries of a salt: its group has ended."""

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
