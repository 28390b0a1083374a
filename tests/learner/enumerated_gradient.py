"""Gradients of the toy process of `enumeration.py`, token by token, and the moments of an estimate of them.

Legend: E tokens, P parameters of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from enumeration import ENV, MAX_LENGTH, VOCABULARY, Floats, Policy, Tokens, Toy, place


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredTokens:
    """Tokens with the place of their parameters: what ∇ log π of them is made of.

    Attributes:
        place: [E] index of the token's place among all contexts; token: [E].
    """

    place: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, at: Sequence[int]) -> ScoredTokens:
        """The tokens at the positions `at` of a row."""
        places = [place(tokens[:i]) for i in at]
        shape = (MAX_LENGTH, 5, 5)
        index = np.ravel_multi_index(np.array(places, np.int64).reshape(-1, 3).T, shape)
        return cls(place=np.asarray(index, np.int64), token=np.array([tokens[i] for i in at], np.int64))

    @classmethod
    def join(cls, parts: Sequence[ScoredTokens]) -> ScoredTokens:
        return cls(
            place=np.concatenate([part.place for part in parts]), token=np.concatenate([part.token for part in parts])
        )

    def logprobs(self, policy: Policy) -> Floats:
        """[E]."""
        found: Floats = policy.logprobs.reshape(-1, VOCABULARY)[self.place, self.token]
        return found

    def gradient(self, policy: Policy, factors: Floats) -> Floats:
        """[P] Σ factors·∇ log π."""
        probabilities = np.exp(policy.logprobs.reshape(-1, VOCABULARY))
        num_places = len(probabilities)
        total = np.zeros((num_places, VOCABULARY))
        np.add.at(total, (self.place, self.token), factors)
        total -= np.bincount(self.place, factors, num_places)[:, None] * probabilities
        return total.ravel()

    def squared_norms(self, policy: Policy) -> Floats:
        """[E] of each token's ∇ log π; the tokens of a row have no parameter in common."""
        probabilities = np.exp(policy.logprobs.reshape(-1, VOCABULARY))[self.place]
        own = probabilities[np.arange(len(self.token)), self.token]
        norms: Floats = (probabilities**2).sum(axis=1) - 2.0 * own + 1.0
        return norms


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of a gradient estimate per target. `second` sums the squared norms of its rows: a probe counts apart."""

    mean: Floats
    second: float

    @property
    def deviation(self) -> float:
        return float(np.sqrt(self.second - (self.mean**2).sum()))


def on_policy(toy: Toy, advantage: Callable[[float], float]) -> Moments:
    """Of targets alone, sampled by the learner's policy: ∇ E[A]."""
    mean = np.zeros(toy.learner.logits.size)
    second = 0.0
    for tokens, _ in toy.targets:
        scored = ScoredTokens.of(tokens, [i for i, token in enumerate(tokens) if token < ENV])
        probability = float(np.exp(scored.logprobs(toy.learner).sum()))
        factor = advantage(toy.reward(tokens))
        mean += scored.gradient(toy.learner, np.full(len(scored.token), probability * factor))
        second += probability * factor**2 * float(scored.squared_norms(toy.learner).sum())
    return Moments(mean=mean, second=second)
