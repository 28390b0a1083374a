"""What the scores of an evaluation say: figures of one version, each with its 95% bootstrap interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rexrag.types import EpisodeScore

NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions with its 95% bootstrap interval (percentiles of resampled means)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What one evaluation found. `em` is the mean over all questions; `macro_em` the mean over data sources.

    `refused` searches are those of all questions together. `by_source` and `by_hops` give em and the number of
    questions behind it.
    """

    n: int
    em: Estimate
    f1: Estimate
    macro_em: float
    searches: Estimate
    turns: Estimate
    tokens: Estimate
    valid_action_share: Estimate
    retrieval_recall: Estimate | None
    refused: int
    by_source: Mapping[str, Mapping[str, float]]
    by_hops: Mapping[str, Mapping[str, float]]

    def to_line(self, *, split: str, step: int, version: int, seconds: float) -> dict[str, object]:
        """The report as a line of `eval.jsonl`."""
        line: dict[str, object] = {
            "split": split,
            "step": step,
            "version": version,
            "n": self.n,
            "em": self.em.mean,
            "em_low": self.em.low,
            "em_high": self.em.high,
            "f1": self.f1.mean,
            "f1_low": self.f1.low,
            "f1_high": self.f1.high,
            "macro_em": self.macro_em,
            "by_source": self.by_source,
            "by_hops": self.by_hops,
        }
        for name in ("searches", "turns", "tokens", "valid_action_share", "retrieval_recall"):
            estimate: Estimate | None = getattr(self, name)
            line[name] = None if estimate is None else asdict(estimate)
        return {**line, "refused": self.refused, "seconds": round(seconds, 2)}


def score_line(score: EpisodeScore) -> dict[str, object]:
    """One question's scores and trace, as a line of a file of predictions."""
    return {**asdict(score), "version": score.version.step, "end_reason": score.end_reason.value}


def summarize(scores: Sequence[EpisodeScore], *, seed: int = 0) -> EvalReport:
    """Aggregate scores of one version.

    Raises:
        ValueError: no scores, or scores of several versions.
    """
    versions = {score.version for score in scores}
    if len(versions) != 1:
        raise ValueError(f"an evaluation belongs to one version, these scores have {len(versions)}: {sorted(versions)}")
    by_source = _group_em(scores, lambda score: score.data_source)
    known = [score for score in scores if score.gold_retrieved is not None]

    def estimate(values: Iterable[float]) -> Estimate:
        return bootstrap(list(values), seed=seed)

    return EvalReport(
        n=len(scores),
        em=estimate(score.em for score in scores),
        f1=estimate(score.f1 for score in scores),
        macro_em=float(np.mean([row["em"] for row in by_source.values()])),
        searches=estimate(score.num_searches for score in scores),
        turns=estimate(score.num_turns for score in scores),
        tokens=estimate(score.num_tokens for score in scores),
        valid_action_share=estimate(1 - score.num_malformed / max(score.num_turns, 1) for score in scores),
        retrieval_recall=estimate(float(bool(score.gold_retrieved)) for score in known) if known else None,
        refused=sum(score.num_refused for score in scores),
        by_source=by_source,
        by_hops=_group_em(scores, lambda score: None if score.hops is None else str(score.hops)),
    )


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean and 95% percentile bootstrap interval (Efron 1979) of values, at least one."""
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    # One after the other: all at once would take gigabytes for the test sets of this field.
    means = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean=float(array.mean()), low=float(low), high=float(high))


def _group_em(scores: Sequence[EpisodeScore], key: Callable[[EpisodeScore], str | None]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        if (name := key(score)) is not None:
            groups[name].append(score.em)
    return {name: {"em": float(np.mean(ems)), "n": len(ems)} for name, ems in sorted(groups.items())}
