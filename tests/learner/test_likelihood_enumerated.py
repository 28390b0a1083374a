"""§7b: what `normalized` expects over all groups, against ∇log P(right), by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from enumerated_estimates import Case, World, estimate
from enumerated_gradient import on_policy
from enumerated_groups import Floats, GroupRows, expected_shares

from rexrag.learner.advantage import likelihood_advantages

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.timeout(900)]

DOCS = Path(__file__).parents[2] / "docs" / "estimators.md"
SIZES = (2, 4, 8, 16, 64)
MANY = 1 << 16


def normalized(name: str = "`normalized`, staleness in the shares", *, group_size: int, **changes: object) -> Case:
    return Case(**{"name": name, "mixture": "normalized", "group_size": group_size, **changes})  # type: ignore[arg-type]


CHANGES: dict[str, dict[str, object]] = {
    "`normalized`, staleness in the shares": {},
    "φ estimated by turn and the token before": {"phi": "estimated"},
    "φ = 1": {"phi": "one"},
    "staleness per token": {"stale": "token"},
    "staleness per token, capped at 2, φ estimated (`rex`)": {"stale": "token", "cap": 2.0, "phi": "estimated"},
    "prefix not trained": {"train_prefix": False},
    "hints not trained": {"train_hints": False},
    "weights of `token`": {"mixture": "token", "likelihood": True, "stale": "token"},
    "weights of `none`": {"mixture": "none", "likelihood": True, "stale": "token"},
}


class Likelihood:
    """∇log P(right) of the toy, and how far an estimate is from it."""

    def __init__(self) -> None:
        self.world = World()
        self._found: dict[str, tuple[float, float]] = {}

    @cached_property
    def wanted(self) -> Floats:
        """[P]."""
        toy = self.world.toy
        return on_policy(toy, lambda reward: reward).mean / toy.probability_of_right

    def relative(self, got: Floats) -> tuple[float, float]:
        """Length of the difference over that of ∇log P(right), and the cosine with it."""
        size = float(np.linalg.norm(self.wanted))
        return float(np.linalg.norm(got - self.wanted)) / size, float(got @ self.wanted / size / np.linalg.norm(got))

    def of(self, case: Case) -> tuple[float, float]:
        key = repr(case)
        if key not in self._found:
            self._found[key] = self.relative(estimate(self.world, case).mean)
        return self._found[key]


@pytest.fixture(scope="module")
def likelihood() -> Likelihood:
    return Likelihood()


@pytest.mark.parametrize("num_targets", [2, 3])
def test_the_integral_is_the_sum_over_all_groups(num_targets: int) -> None:
    rng = np.random.default_rng(num_targets)
    rows = few_rows(rng)
    families = list(all_families(rows))
    assert sum(chance for chance, _ in families) == pytest.approx(1.0, abs=1e-12)
    wanted = np.zeros(len(rows.reward))
    for group in itertools.product(families, repeat=num_targets):
        members = [row for _, family in group for row in family]
        advantages = likelihood_advantages(
            rows.reward[members], log_weights=np.log(rows.weight[members]), num_targets=num_targets
        )
        np.add.at(wanted, members, np.prod([chance for chance, _ in group]) * advantages / num_targets)
    assert expected_shares(rows, num_targets=num_targets) == pytest.approx(wanted, abs=1e-13)


def few_rows(rng: np.random.Generator) -> GroupRows:
    """Two right targets, one that cannot be forked, two places with two failed targets and three probes each."""
    rate, targets = 0.6, rng.dirichlet(np.ones(7))
    probes = [rate * targets[at : at + 2].sum() * rng.dirichlet(np.ones(3)) for at in (3, 5)]
    return GroupRows(
        probability=np.concatenate([targets, *probes]),
        reward=np.array([1.0, 1.0, *[0.0] * 5, 1.0, 0.0, 0.4, 1.0, 0.0, 0.4]),
        weight=np.exp(2.0 * rng.normal(size=13) - 1.0),
        is_probe=np.arange(13) >= 7,
        place=np.array([-1, -1, -1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]),
        probe_rate=rate,
    )


def all_families(rows: GroupRows) -> Iterator[tuple[float, list[int]]]:
    for target in np.flatnonzero(~rows.is_probe).tolist():
        chance, place = float(rows.probability[target]), rows.place[target]
        if place < 0:
            yield chance, [target]
            continue
        yield chance * (1.0 - rows.probe_rate), [target]
        forked = rows.probability[~rows.is_probe & (rows.place == place)].sum()
        for probe in np.flatnonzero(rows.is_probe & (rows.place == place)).tolist():
            yield chance * float(rows.probability[probe]) / float(forked), [target, probe]


def test_without_probes_or_staleness_only_the_length_is_biased() -> None:
    """MaxRL (arXiv 2602.02710): of n rows the gradient of log P(right) comes 1 − (1 − p)^(n − 1) times."""
    rng = np.random.default_rng(0)
    chance = rng.dirichlet(np.ones(6))
    reward = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    rows = GroupRows(
        probability=chance, reward=reward, weight=np.ones(6), is_probe=np.zeros(6, bool),
        place=np.full(6, -1), probe_rate=0.0,
    )  # fmt: skip
    right = float(chance @ reward)
    for num_targets in (2, 5, 64):
        # ∇log p = Σ π·(R/p − 1)·∇log π, since Σ π·∇log π is 0; of the last term a multiple may be added.
        got = expected_shares(rows, num_targets=num_targets)
        wanted = (1.0 - (1.0 - right) ** (num_targets - 1)) * chance * (reward / right - 1.0)
        shift = (got - wanted) / chance
        assert shift == pytest.approx(np.full(6, shift[0]), abs=1e-12)


def test_it_goes_to_the_gradient_of_the_log_likelihood_as_one_over_the_rows(likelihood: Likelihood) -> None:
    biases = {size: likelihood.of(normalized(group_size=size))[0] for size in (*SIZES, 1024, MANY)}
    assert list(biases.values()) == sorted(biases.values(), reverse=True)
    assert biases[MANY] < 2e-4
    assert biases[MANY] * MANY == pytest.approx(biases[1024] * 1024, rel=0.05)


@pytest.mark.parametrize("name", ["φ = 1", "staleness per token", "prefix not trained", "weights of `token`"])
def test_each_condition_that_is_removed_leaves_a_bias(likelihood: Likelihood, name: str) -> None:
    bias, _ = likelihood.of(normalized(name, group_size=MANY, **CHANGES[name]))
    assert bias > 0.05


def test_the_table_is_the_documented_one(likelihood: Likelihood) -> None:
    lines = []
    for name, changes in CHANGES.items():
        sizes = (*SIZES, MANY) if not changes else (8, MANY)
        found = {size: likelihood.of(normalized(name, group_size=size, **changes)) for size in sizes}
        cells = [f"{found[size][0]:.2f} ({found[size][1]:.2f})" if size in found else "" for size in (*SIZES, MANY)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    missing = [line for line in lines if line not in DOCS.read_text().splitlines()]
    assert not missing, "docs/estimators.md lacks\n" + "\n".join(lines)
