"""Weights of whole trajectories: by hand, against a plain loop, and for all that may be put in."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_builders import POOL, probe, target, trajectory
from torch import Tensor

from rexrag.learner.branches import MAX_PLACES, BranchPosition, BranchRates, branch_places, decompositions, place_of
from rexrag.learner.correction import mixture_logprob, sequence_probe_logprob
from rexrag.learner.sequence_weights import sequence_log_weights
from rexrag.types import Origin, Trajectory

INF = math.inf
NAN = math.nan


class Fixed(BranchRates):
    """One φ everywhere."""

    def __init__(self, phi: float) -> None:
        super().__init__()
        self._phi = phi

    def phi(self, trajectory: Trajectory, at: BranchPosition) -> float:
        return self._phi


def log_weights(*rows: Trajectory, rate: float = 0.5, phi: float = 0.5, transfer: str = "hinted") -> list[float]:
    found = sequence_log_weights(
        rows,
        probe_rate=rate,
        hints=POOL,
        branch="answer",
        transfer=transfer,  # type: ignore[arg-type]
        rates=Fixed(phi),
    )
    assert found.dtype == torch.float64
    return found.tolist()


def test_branch_positions_reach_to_the_first_token_of_the_action() -> None:
    parts = [(Origin.POLICY, [10, 11, 12]), (Origin.ENV, [9]), (Origin.POLICY, [13, 14])]
    row = trajectory(parts, action_starts=[5, 9])  # the second turn has no action: its end
    wanted = [(3, 0), (4, 0), (5, 0), (7, 1), (8, 1), (9, 1)]
    assert list(zip(*branch_places(row, branch="answer"), strict=True)) == wanted
    assert list(zip(*branch_places(row, branch="turn"), strict=True)) == [(3, 0), (7, 1)]


def test_decompositions_are_hints_at_branch_positions_in_targets_too() -> None:
    # The pool: [5, 6], [5, 6, 7], [5, 8].
    parts = [(Origin.POLICY, [10, 5, 6, 7, 11]), (Origin.ENV, [5, 8]), (Origin.POLICY, [5, 6, 12])]
    early = trajectory(parts, action_starts=[7, 10])
    found = [(d.at.position, d.hint_id) for d in decompositions(early, hints=POOL, branch="answer")]
    assert found == [(4, 0), (4, 1), (10, 0)]
    late = trajectory(parts, action_starts=[3, 12])  # the first hint stands after the action's first token
    assert [d.at.position for d in decompositions(late, hints=POOL, branch="answer")] == [10]
    assert [d.at.position for d in decompositions(early, hints=POOL, branch="turn")] == [10]


def test_weight_of_a_probe_by_hand() -> None:
    # p = 1/2: α = 1/3. Kept token .5, hint [5, 6] with .01 and .2, then .25 and .75. PMF([5, 6]) = 1/3. The tokens
    # cancel but for the hint's: w = 1 / (2/3 + 1/3 · φ · (1/3) / (.01 · .2)).
    row = probe(hint_id=0, logprob=[math.log(p) for p in (0.5, 0.01, 0.2, 0.25, 0.75)], action_starts=[7])
    wanted = 1.0 / (2 / 3 + 1 / 3 * 0.5 * (1 / 3) / (0.01 * 0.2))
    assert log_weights(row) == pytest.approx([math.log(wanted)], abs=1e-7)


def test_weight_of_a_target_that_reflects_by_itself_is_that_of_the_probe() -> None:
    logprob = [math.log(p) for p in (0.5, 0.01, 0.2, 0.25, 0.75)]
    alone = trajectory([(Origin.POLICY, [10, 5, 6, 20, 21])], logprob=logprob, action_starts=[7])
    assert log_weights(alone) == log_weights(probe(hint_id=0, logprob=logprob, action_starts=[7]))


def test_weight_of_a_target_that_no_probe_writes() -> None:
    assert log_weights(target(), rate=0.5) == pytest.approx([math.log(1.5)], abs=1e-12)
    assert log_weights(target(), rate=0.0) == [0.0]


def test_hints_that_begin_one_another_add_up() -> None:
    # [5, 6, 7] decomposes as hint 1, PMF 1/3, and as hint 0 followed by an own 7.
    logprob = [math.log(p) for p in (0.1, 0.2, 0.4, 0.5)]
    row = trajectory([(Origin.HINT, [5, 6, 7]), (Origin.POLICY, [20])], parent=0, branch_point=0, hint_id=1,
                     logprob=logprob, action_starts=[6])  # fmt: skip
    ratio = 0.5 * (1 / 3) / (0.1 * 0.2) + 0.5 * (1 / 3) / (0.1 * 0.2 * 0.4)
    assert log_weights(row) == pytest.approx([-math.log(2 / 3 + ratio / 3)], abs=1e-7)


def test_hint_free_weights_by_hand() -> None:
    # Three branch positions without the hint: 3, 4 and the action's first token; r = 1/3. With the hint o'' has
    # .5 · .6, without it .1 · .2: w = 1 / (2/3 + 1/3 · φ · 3 · (.3 / .02)).
    logprob = [math.log(p) for p in (0.9, 0.01, 0.2, 0.5, 0.6)]
    free = np.array([0, 0, 0, 0, 0, 0, math.log(0.1), math.log(0.2)], np.float32)
    row = probe(hint_id=0, logprob=logprob, action_starts=[7], alternative_logprob=free, score_version=0)
    wanted = 1.0 / (2 / 3 + 1 / 3 * 0.5 * 3 * (0.3 / 0.02))
    assert log_weights(row, transfer="hint_free") == pytest.approx([math.log(wanted)], abs=1e-6)
    # A target with the same tokens and the same drawn branch and hint: the same weight.
    own = [math.log(p) for p in (0.9, 0.1, 0.2)]
    hinted = np.array([0, 0, 0, 0, math.log(0.5), math.log(0.6)], np.float32)
    same = trajectory(
        [(Origin.POLICY, [10, 20, 21])], logprob=own, action_starts=[5], alternative_logprob=hinted,
        alternative_branch=1, alternative_hint_id=0, score_version=0,
    )  # fmt: skip
    assert log_weights(same, transfer="hint_free") == pytest.approx([math.log(wanted)], abs=1e-6)
    # One whose drawn hint does not fit it.
    other = trajectory([(Origin.POLICY, [10, 20])], alternative_branch=1, alternative_hint_id=0, action_starts=[5])
    assert log_weights(other, transfer="hint_free") == pytest.approx([math.log(1.5)], abs=1e-12)
    with pytest.raises(ValueError, match="without alternative_branch"):
        log_weights(target(), transfer="hint_free")


def test_a_probe_whose_action_opens_before_its_hint_has_weight_zero() -> None:
    free = np.array([0, 0, 0, 0, 0, 0, -1, -1], np.float32)
    row = probe(hint_id=0, action_starts=[3], alternative_logprob=free, score_version=0)  # the branch is at 4
    assert log_weights(row, target_with_draw(), transfer="hint_free")[0] == -INF
    with pytest.raises(ValueError, match="token 5 is no branch position"):
        log_weights(target_with_draw(branch=2), transfer="hint_free")

    assert log_weights(probe(hint_id=0, action_starts=[3])) == [-INF]
    assert log_weights(target(action_starts=[3]))[0] > -INF, "a target covers such rows"


@pytest.mark.parametrize("transfer", ["hinted", "hint_free"])
def test_without_probes_every_weight_is_one(transfer: str) -> None:
    """Nothing is scored for them then."""
    assert log_weights(target(), target(), rate=0.0, transfer=transfer) == [0.0, 0.0]


def target_with_draw(branch: int = 0) -> Trajectory:
    scores = np.array([0, 0, 0, -1, -1, -1], np.float32)
    return target(
        action_starts=[4],
        alternative_logprob=scores,
        alternative_branch=branch,
        alternative_hint_id=0,
        score_version=0,
    )


def test_rates_are_counted_by_turn_and_the_token_before() -> None:
    parts = [(Origin.POLICY, [10, 11]), (Origin.ENV, [9]), (Origin.POLICY, [10, 12])]
    failed = trajectory(parts, action_starts=[4, 7], branch_point=4)  # forks before its action, token 7
    right = trajectory(parts, action_starts=[4, 7], branch_point=4, reward=1.0)
    rates = BranchRates()
    at = BranchPosition(7, 1)
    assert place_of(failed, at) == (1, 10)
    assert rates.phi(failed, at) == 0.5  # nothing seen yet
    rates.observe([failed, failed, right], branch="answer")
    assert rates.phi(failed, at) == pytest.approx((2 + 0.5) / (3 + 1))
    assert rates.phi(failed, BranchPosition(6, 1)) == pytest.approx(0.5 / 4)
    rates.observe([right], branch="answer")
    assert rates.phi(failed, at) == pytest.approx((1.6 + 0.5) / (2.4 + 1 + 1))
    assert BranchRates.of_table(rates.table()).table() == rates.table()
    assert [row[:2] for row in rates.table()] == sorted(row[:2] for row in rates.table())


def places(num: int, *, seen: float = 1.0) -> list[tuple[int, int, float, float]]:
    return [(number % 6, number, seen, 0.25 * seen) for number in range(num)]


def test_a_step_at_the_bound_of_the_table_costs_milliseconds() -> None:
    """A loop over its places takes seconds; so does one over the tokens of long rows."""
    rng = np.random.default_rng(0)
    words = [int(word) for word in rng.integers(0, 50_000, 4000)]
    targets = [trajectory([(Origin.POLICY, words)], action_starts=[3 + len(words)]) for _ in range(50)]
    took_s = []
    for _ in range(3):
        rates = BranchRates.of_table(places(100_000))
        started = time.process_time()
        rates.observe(targets, branch="answer")
        took_s.append(time.process_time() - started)
        assert len(rates) == MAX_PLACES
    assert min(took_s) < 1.0


def test_places_that_are_no_longer_met_are_forgotten() -> None:
    rates = BranchRates.of_table(places(1000))
    met = trajectory([(Origin.POLICY, [10, 11])], action_starts=[5])
    for _ in range(40):
        rates.observe([met], branch="answer")
    assert [row[:2] for row in rates.table()] == [(0, 3), (0, 10), (0, 11)]


def test_at_the_bound_the_places_seen_most_stay() -> None:
    often = [(5, 1_000_000 + number, 9.0, 3.0) for number in range(10)]
    rates = BranchRates.of_table([*places(MAX_PLACES + 500), *often])
    assert len(rates) == MAX_PLACES
    assert rates.table()[-10:] == often


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Rows of some tokens, empty ones among them, with decompositions of rows that have tokens."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    offsets = np.cumsum([0, *lengths])
    logprob = draw(st.lists(st.floats(-50.0, 0.0), min_size=int(offsets[-1]), max_size=int(offsets[-1])))
    candidates = [n for n, length in enumerate(lengths) if length]
    found = []
    for _ in range(draw(st.integers(0, 6)) if candidates else 0):
        row = draw(st.sampled_from(candidates))
        start = draw(st.integers(0, lengths[row] - 1))
        length = draw(st.integers(1, lengths[row] - start))
        found.append((row, start, length, draw(st.floats(-9.0, 0.0)), draw(st.floats(-9.0, 0.0) | st.just(-INF))))
    columns: list[tuple[float, ...]] = list(zip(*found, strict=True)) or [()] * 5
    whole = [torch.tensor(column, dtype=torch.int64) for column in columns[:3]]
    real = [torch.tensor(column, dtype=torch.float64) for column in columns[3:]]
    return {
        "behavior_logprob": torch.tensor(logprob, dtype=torch.float64),
        "offsets": torch.tensor(offsets),
        **dict(zip(("row", "start", "length"), whole, strict=True)),
        **dict(zip(("log_pmf", "log_phi"), real, strict=True)),
    }


def by_loop(batch: dict[str, Tensor]) -> list[float]:
    found = []
    for n in range(len(batch["offsets"]) - 1):
        tokens = batch["behavior_logprob"][batch["offsets"][n] : batch["offsets"][n + 1]]
        terms = []
        for d in range(len(batch["row"])):
            if int(batch["row"][d]) == n:
                start, length = int(batch["start"][d]), int(batch["length"][d])
                terms.append(batch["log_phi"][d] + batch["log_pmf"][d] - tokens[start : start + length].sum())
        inside = torch.logsumexp(torch.stack(terms), 0) if terms else torch.tensor(-INF)
        found.append(float(tokens.sum() + inside))
    return found


@given(batches(), st.floats(0.0, 0.99))
@settings(deadline=None, max_examples=200)
def test_density_of_probes_is_that_of_a_loop(batch: dict[str, Tensor], alpha: float) -> None:
    log_mu = sequence_probe_logprob(**batch)
    assert log_mu.tolist() == pytest.approx(by_loop(batch), abs=1e-9)
    floats = {k: v.float() if v.dtype == torch.float64 else v for k, v in batch.items()}
    assert sequence_probe_logprob(**floats).tolist() == pytest.approx(log_mu.tolist(), rel=1e-5, abs=1e-5)
    total = torch.stack([part.sum() for part in batch["behavior_logprob"].split(batch["offsets"].diff().tolist())])  # type: ignore[no-untyped-call]
    assert torch.isfinite(mixture_logprob(total, log_mu, alpha)).all()


def test_a_million_tokens_lose_no_precision() -> None:
    num = 1_000_000
    behavior = -torch.rand(num, generator=torch.Generator().manual_seed(0)) * 20
    one = {"row": torch.tensor([0]), "start": torch.tensor([1000]), "length": torch.tensor([12])}
    small = {"log_pmf": torch.tensor([-2.0]), "log_phi": torch.tensor([-0.5])}
    log_mu = sequence_probe_logprob(behavior, torch.tensor([0, num]), **one, **small)
    exact = behavior.double().sum() - 2.5 - behavior[1000:1012].double().sum()
    assert float(log_mu[0]) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"behavior_logprob": torch.tensor([-1.0, NAN, -1.0])}, "behavior_logprob has the value nan.*finite"),
        ({"behavior_logprob": torch.tensor([-1.0, -INF, -1.0])}, "behavior_logprob has the value -inf"),
        ({"offsets": torch.tensor([0, 2])}, r"offsets has the ends \[0, 2\], they must be 0 and the 3 tokens"),
        ({"offsets": torch.tensor([1, 3])}, r"offsets has the ends \[1, 3\]"),
        ({"offsets": torch.tensor([0, 4, 3])}, "step of offsets has the value -1"),
        ({"row": torch.tensor([1])}, r"row has the value 1.*\[0, 1\)"),
        ({"start": torch.tensor([2])}, "start has the value 2.*inside its row"),
        ({"start": torch.tensor([-1])}, "start has the value -1"),
        ({"length": torch.tensor([0])}, "length has the value 0.*at least 1"),
        ({"length": torch.tensor([2, 1])}, "one length, they have row 1, start 1, length 2"),
        ({"log_pmf": torch.tensor([0.1])}, "log_pmf has the value 0.1.*at most 0"),
        ({"log_phi": torch.tensor([NAN])}, "log_phi has the value nan"),
        ({"log_phi": torch.tensor([INF])}, "log_phi has the value inf"),
    ],
)
def test_what_is_refused(changes: dict[str, Tensor], match: str) -> None:
    good = {
        "behavior_logprob": torch.tensor([-1.0, -2.0, -3.0]),
        "offsets": torch.tensor([0, 3]),
        "row": torch.tensor([0]),
        "start": torch.tensor([1]),
        "length": torch.tensor([2]),
        "log_pmf": torch.tensor([-1.0]),
        "log_phi": torch.tensor([-1.0]),
    }
    with pytest.raises(ValueError, match=match):
        sequence_probe_logprob(**{**good, **changes})
