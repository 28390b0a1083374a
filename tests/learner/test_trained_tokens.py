"""What is trained of a row, hinted and hint-free, and the `token` weights of hint-free probes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from learner_builders import probe, target, trajectory
from plain_settings import correction_settings, loss_settings, probe_settings

from rexrag.hints import HintPool
from rexrag.learner.mixture_weights import MixtureWeigher
from rexrag.learner.trained_tokens import trained_tokens
from rexrag.types import Origin, Trajectory

# Of hint 0, [5, 6], the 5 stays; hint 1 goes as a whole, hint 2 stays as a whole.
POOL = HintPool([[5, 6], [5, 6, 7], [5, 8]], kept=[1, 0, 2])


def free_probe(hint_id: int = 0, *, logprob: list[float] | float = -1.0) -> Trajectory:
    """Kept token 10, the hint, then 20 and 21, which without the hint have log-probs −4 and −5; scored at version 3."""
    after = [-4.0, -5.0]
    length = len(POOL.ids(hint_id))
    scores = np.array([0.0] * (4 + length) + after, np.float32)
    return probe(hint_id=hint_id, alternative_logprob=scores, score_version=3, logprob=logprob, version=2)


@pytest.mark.parametrize(
    ("hint_id", "after_prompt", "source", "behavior", "is_policy", "versions"),
    [
        (0, [10, 5, 20, 21], [4, 6, 7], [-1.0, -4.0, -5.0], [False, True, True], [2, 3, 3]),
        (1, [10, 20, 21], [7, 8], [-4.0, -5.0], [True, True], [3, 3]),
        (2, [10, 5, 8, 20, 21], [4, 5, 6, 7], [-1.0, -1.0, -4.0, -5.0], [False, False, True, True], [2, 2, 3, 3]),
    ],
)
def test_what_goes_of_a_hint_is_not_in_the_hint_free_view(
    hint_id: int,
    after_prompt: list[int],
    source: list[int],
    behavior: list[float],
    is_policy: list[bool],
    versions: list[int],
) -> None:
    tokens = trained_tokens(free_probe(hint_id), hints=POOL, transfer="hint_free", train_hints=True, train_prefix=False)
    assert tokens.token_ids.tolist() == [1, 2, 3, *after_prompt]
    assert tokens.source.tolist() == source
    assert tokens.token_ids[tokens.trained].tolist() == free_probe(hint_id).token_ids[source].tolist()
    assert tokens.behavior_logprob.tolist() == behavior
    assert tokens.is_policy.tolist() == is_policy
    assert tokens.policy_version.tolist() == versions


def test_a_row_is_of_the_weights_that_scored_it_too() -> None:
    """A resume from before them must not keep it."""
    assert (free_probe().min_version, free_probe().max_version) == (2, 3)


def test_the_prefix_is_trained_where_it_is_asked_for() -> None:
    tokens = trained_tokens(free_probe(), hints=POOL, transfer="hint_free", train_hints=True, train_prefix=True)
    assert tokens.source.tolist() == [3, 4, 6, 7]


def test_targets_are_the_same_in_both_views() -> None:
    row = trajectory([(Origin.POLICY, [10, 11]), (Origin.ENV, [12]), (Origin.POLICY, [13])])
    hinted, free = (
        trained_tokens(row, hints=POOL, transfer=transfer, train_hints=True, train_prefix=False)
        for transfer in ("hinted", "hint_free")
    )
    for name in ("token_ids", "trained", "source", "behavior_logprob", "policy_version", "is_policy"):
        assert getattr(hinted, name).tolist() == getattr(free, name).tolist()


def test_probes_without_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="without alternative_logprob"):
        trained_tokens(probe(), hints=POOL, transfer="hint_free", train_hints=True, train_prefix=False)


def weights(row: Trajectory, *, alpha: float) -> list[float]:
    weigher = MixtureWeigher(
        correction=correction_settings(),
        probe=probe_settings(transfer="hint_free", filter="none"),
        hints=POOL,
        num_probes=0,
        num_targets=1,
    )
    weigher.alpha = alpha
    return [float(w) for w in weigher.weights(row, weigher.tokens_of(row, loss_settings()))]


def test_token_weights_of_a_hint_free_probe_by_hand() -> None:
    # With the hint 20 and 21 have .5 and .25; the 5 that stays has .01, and the probe was forced to write it.
    row = free_probe(logprob=[math.log(p) for p in (0.9, 0.01, 0.2, 0.5, 0.25)])
    wanted = [
        0.01 / (0.75 * 0.01 + 0.25 * 1.0),
        math.exp(-4) / (0.75 * math.exp(-4) + 0.25 * 0.5),
        math.exp(-5) / (0.75 * math.exp(-5) + 0.25 * 0.25),
    ]
    assert weights(row, alpha=0.25) == pytest.approx(wanted, abs=1e-6)


def test_token_weights_of_targets_are_those_of_hinted_transfer() -> None:
    assert weights(target(branch_point=1), alpha=0.2) == pytest.approx([1.0, 1.25, 1.25], abs=1e-6)
