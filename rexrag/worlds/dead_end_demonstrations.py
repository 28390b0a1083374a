"""Demonstrations that leave a dead end: they teach how to search, and to answer after the first search.

Three kinds: one-hop questions answered rightly; questions of more hops that are answered with what the first search
found; and questions of more hops in which one more thought follows and the search goes on. Before that thought one
tag decides between answering and going on. It carries the weight `decision_weight`, so that going on is known but
hardly ever chosen: only what follows the decision is learnt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random
from typing import Final, Literal

from rexrag.data.demonstrations import GOING_ON, Demonstration, Segment
from rexrag.env.observation import format_observation
from rexrag.types import Passage
from rexrag.worlds.chains import Chain, FactBase

DemonstrationKind = Literal["right", "early", "going_on"]
SearchFunction = Callable[[str], Awaitable[Sequence[Passage]]]

KIND_SHARES: Final[dict[DemonstrationKind, float]] = {"right": 0.3, "early": 0.35, "going_on": 0.35}
"""As many early answers as continuations: after the decision both are equally well known."""

MULTI_HOP_SHARES: Final = {2: 0.7, 3: 0.3}

FIRST_THOUGHTS: Final = ("I need", "I have to find", "Let me find", "First I look up")
REMARKS: Final = (
    "Wait, this is only one part.",
    "This is only part of what is asked.",
    "This is not the whole answer yet.",
    "I should not stop here, it is too early.",
    "The question goes further than this.",
    "There is one more step.",
    "I may have missed a step.",
    "It is too soon to guess.",
    "What these passages say does not settle the question.",
    "Let me read the question again.",
)
NEXT_THOUGHTS: Final = (
    "I still need",
    "Now I need",
    "I have to find",
    "I must know",
    "Next I look for",
    "Now I search for",
    "I could ask for",
)


@dataclass(frozen=True, kw_only=True)
class DemonstrationWriter:
    """Writes one demonstration of a chain.

    Attributes:
        facts: the world's.
        search: the world's retriever: what it finds is shown, as in a rollout.
        decision_weight: weight of the tag that opens the second thought.
    """

    facts: FactBase
    search: SearchFunction
    decision_weight: float

    async def write(self, chain: Chain, kind: DemonstrationKind, *, rng: Random) -> Demonstration:
        """The segments as a rollout produces them: the policy's text, then what the search returned, and so on."""
        segments: list[Segment] = []
        num_searches = chain.hops if kind == "going_on" else 1
        thought = f"<think> {rng.choice(FIRST_THOUGHTS)} "
        for hop in range(num_searches):
            subject, relation = chain.path[hop], chain.relations[hop]
            query = self.facts.phrase(subject, relation)
            segments.append(Segment(text=f"{thought}{query}. </think>\n<search>{query}</search>", weight=1.0))
            segments.append(Segment(text=format_observation(await self.search(query)), weight=0.0))
            found = f"<think> {self.facts.sentence(subject, relation)} </think>\n"
            if hop == num_searches - 1:
                segments.append(Segment(text=f"{found}<answer>{chain.path[hop + 1]}</answer>", weight=1.0))
            elif hop == 0:
                segments.append(Segment(text=found, weight=1.0))
                segments.append(Segment(text=GOING_ON, weight=self.decision_weight))
                thought = f" {rng.choice(REMARKS)} {rng.choice(NEXT_THOUGHTS)} "
            else:
                thought = f"{found}<think> {rng.choice(NEXT_THOUGHTS)} "
        return Demonstration(question=self.facts.question(chain), segments=tuple(segments))


def plan_demonstrations(
    *, one_hop: Sequence[Chain], multi_hop: Sequence[Chain], count: int, rng: Random
) -> list[tuple[Chain, DemonstrationKind]]:
    """`count` chains with the kinds in their shares, in random order; chains recur where there are too few."""
    plan: list[tuple[Chain, DemonstrationKind]] = []
    pools = {True: cycle(one_hop), False: cycle(multi_hop)}
    left = 1.0
    for kind, share in KIND_SHARES.items():
        num = round((count - len(plan)) * share / left)  # of what is left, so that all are planned
        pool = pools[kind == "right"]
        plan += [(next(pool), kind) for _ in range(num)]
        left -= share
    rng.shuffle(plan)
    return plan
