from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_builders import POOL, probe, trajectory
from plain_settings import correction_settings, loss_settings, probe_settings

from rexrag.learner.correction import importance_weight, mixture_logprob, token_probe_logprob
from rexrag.learner.loss import policy_loss
from rexrag.learner.mixture_weights import MixtureWeigher
from rexrag.types import Origin, Trajectory

INF = math.inf
NAN = math.nan
LOGPROBS = st.floats(-200.0, 0.0, width=32)


def weights(row: Trajectory, *, alpha: float, mixture: str = "token") -> dict[int, float]:
    settings = correction_settings(mixture=mixture)
    weigher = MixtureWeigher(correction=settings, probe=probe_settings(), hints=POOL, num_probes=0, num_targets=1)
    weigher.alpha = alpha
    tokens = weigher.tokens_of(row, loss_settings(train_prefix=True))
    w = weigher.weights(row, tokens)
    return dict(zip(tokens.source.tolist(), w.tolist(), strict=True))


def test_token_mixture_of_a_probe_by_hand() -> None:
    # 3 prompt tokens, one kept, hint 0 = [5, 6], two of its own. The pool: [5, 6], [5, 6, 7], [5, 8], so
    # PMF(5) = 1 and PMF(6 and end | 5) = 2/3 * 1/2 = 1/3.
    row = probe(hint_id=0, logprob=[math.log(p) for p in (0.5, 0.01, 0.2, 0.25, 0.75)])
    got = weights(row, alpha=0.25)
    assert got[4] == pytest.approx(0.01 / (0.75 * 0.01 + 0.25 * 1.0), abs=1e-6)
    assert got[5] == pytest.approx(0.2 / (0.75 * 0.2 + 0.25 / 3.0), abs=1e-6)
    assert got[6] == pytest.approx(1.0, abs=1e-6)
    assert got[7] == pytest.approx(1.0, abs=1e-6)
    assert got[3] == pytest.approx(1.0, abs=1e-6)


def test_token_mixture_of_a_target_by_hand() -> None:
    parts = [(Origin.POLICY, [10, 11]), (Origin.ENV, [12]), (Origin.POLICY, [13, 14])]
    row = trajectory(parts, branch_point=3, logprob=[math.log(0.3)] * 5)
    got = weights(row, alpha=0.2)
    assert set(got) == {3, 4, 6, 7}
    assert [got[3], got[4]] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert [got[6], got[7]] == pytest.approx([1.25, 1.25], abs=1e-6)


def test_target_without_branch_position_keeps_weight_one() -> None:
    row = trajectory([(Origin.POLICY, [10, 11])], branch_point=None)
    assert list(weights(row, alpha=0.4).values()) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_without_probes_every_weight_is_exactly_one() -> None:
    row = trajectory([(Origin.POLICY, [10, 11, 12])], branch_point=1, logprob=[-0.1, -3.7, -11.3])
    assert list(weights(row, alpha=0.0).values()) == [1.0, 1.0, 1.0]


def test_no_mixture_means_weight_one_even_on_hints() -> None:
    assert set(weights(probe(logprob=-5.0), alpha=0.3, mixture="none").values()) == {1.0}


def test_hint_of_another_pool_is_refused() -> None:
    parts = [(Origin.POLICY, [10]), (Origin.HINT, [5, 9]), (Origin.POLICY, [20])]
    row = trajectory(parts, parent=0, branch_point=1, hint_id=0)
    with pytest.raises(ValueError, match="not hint 0"):
        token_probe_logprob(row, hints=POOL)


@given(st.lists(st.tuples(LOGPROBS, LOGPROBS | st.just(-INF)), min_size=1), st.floats(0.0, 0.99))
@settings(deadline=None, max_examples=100)
def test_mixture_is_finite_and_bounds_the_weight(pairs: list[tuple[float, float]], alpha: float) -> None:
    behavior, probed = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    log_q = mixture_logprob(behavior, probed, alpha)
    assert torch.isfinite(log_q).all()
    assert ((behavior - log_q).exp() <= 1 / (1 - alpha) + 1e-9).all()
    expected = [math.log((1 - alpha) * math.exp(b) + alpha * math.exp(p)) for b, p in pairs]
    assert log_q.tolist() == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(LOGPROBS, LOGPROBS | st.just(-INF)), min_size=1), st.floats(0.0, 0.99))
@settings(deadline=None, max_examples=100)
def test_single_precision_is_near_double(pairs: list[tuple[float, float]], alpha: float) -> None:
    behavior, probed = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    exact = mixture_logprob(behavior, probed, alpha)
    rounded = mixture_logprob(behavior.float(), probed.float(), alpha)
    assert rounded.dtype is torch.float32
    assert rounded.tolist() == pytest.approx(exact.tolist(), rel=1e-5, abs=1e-5)
    ratio = (behavior - exact).clamp(min=-20.0)
    weight = importance_weight(ratio.float(), bound="none")
    assert weight.tolist() == pytest.approx(importance_weight(ratio, bound="none").tolist(), rel=1e-5)


def test_no_gradient_flows_into_the_weights() -> None:
    behavior = torch.zeros(2, requires_grad=True)
    logprob = torch.full((2,), -1.0, requires_grad=True)
    weight = importance_weight(logprob - behavior)
    loss = policy_loss(
        logprob, proximal_logprob=logprob, advantage=torch.ones(2), weight=weight, settings=loss_settings()
    ).loss.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert behavior.grad is None
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx((-weight.detach()).tolist())


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.5, NAN])
def test_mixture_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .* below 1"):
        mixture_logprob(torch.zeros(1), torch.zeros(1), alpha)


@pytest.mark.parametrize(
    ("behavior", "probed", "name"),
    [(NAN, 0.0, "behavior"), (-INF, 0.0, "behavior"), (INF, 0.0, "behavior"), (0.0, NAN, "probe"), (0.0, INF, "probe")],
)
def test_mixture_refuses_values(behavior: float, probed: float, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}_logprob has the value .*nan|{name}_logprob has the value .*inf"):
        mixture_logprob(torch.tensor([-1.0, behavior]), torch.tensor([-1.0, probed]), 0.5)


@given(
    st.lists(st.floats(-1e4, 1e4) | st.just(-INF), min_size=1),
    st.sampled_from(["truncate", "mask", "none"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0.0, 1.0),
)
@settings(deadline=None, max_examples=150)
def test_weights_are_finite_and_obey_their_bounds(
    values: list[float], bound: str, dtype: torch.dtype, floor: float
) -> None:
    log_ratio = torch.tensor(values, dtype=dtype)
    w = importance_weight(log_ratio, bound=bound, cap=3.0, low=0.25, high=4.0, floor=floor)  # type: ignore[arg-type]
    assert w.dtype is dtype
    assert torch.isfinite(w).all()
    if bound == "none":
        assert (w >= torch.tensor(floor, dtype=dtype)).all()
    if bound == "truncate":
        assert (w <= 3.0).all()
    if bound == "mask":
        assert ((w == 0.0) | ((w >= 0.25) & (w <= 4.0))).all()


def test_bounds_by_hand() -> None:
    log_ratio = torch.tensor([0.1, 0.5, 1.0, 3.0]).log()
    assert importance_weight(log_ratio).tolist() == pytest.approx([0.1, 0.5, 1.0, 2.0])
    assert importance_weight(log_ratio, bound="mask").tolist() == pytest.approx([0.0, 0.5, 1.0, 0.0])
    assert importance_weight(log_ratio, bound="none").tolist() == pytest.approx([0.1, 0.5, 1.0, 3.0])
    floors = torch.tensor([0.0, 0.7, 1.0, 1.0])
    assert importance_weight(log_ratio, bound="none", floor=floors).tolist() == pytest.approx([0.1, 0.7, 1.0, 3.0])
    # The floor comes before the bound: what it lifts into the interval is no longer masked.
    assert importance_weight(log_ratio, bound="mask", floor=0.6).tolist() == pytest.approx([0.6, 0.6, 1.0, 0.0])


@pytest.mark.parametrize("value", [NAN, INF])
def test_weight_refuses_ratios(value: float) -> None:
    with pytest.raises(ValueError, match=f"log_ratio has the value {value}"):
        importance_weight(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"floor": 1.5}, r"floor has the value 1.5.*\[0, 1\]"),
        ({"floor": NAN}, "floor has the value nan"),
        ({"cap": 0.5}, "cap is 0.5.*at least 1"),
        ({"cap": INF}, "cap is inf"),
        ({"bound": "mask", "low": 0.0}, "low is 0.0"),
        ({"bound": "mask", "high": 0.9}, "high 0.9"),
        ({"bound": "clip"}, "bound is 'clip'"),
    ],
)
def test_weight_refuses_settings(fields: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        importance_weight(torch.zeros(1), **fields)  # type: ignore[arg-type]
