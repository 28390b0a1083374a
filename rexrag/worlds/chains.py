"""Facts, chains of them, and the questions that ask for a chain's end.

A fact is (subject, relation) → object. A chain of two relations from Homs, country and capital, is the question
"What is the capital of the country of the city Homs?": each hop needs the object of the one before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, kw_only=True)
class Relation:
    """How a relation is written.

    Attributes:
        sentence: the fact, with {subject} and {object}.
        phrase: the object's description, with {subject}; also the query that finds the fact.
    """

    sentence: str
    phrase: str


@dataclass(frozen=True, kw_only=True)
class Chain:
    """`path[i + 1]` is the object of `relations[i]` at `path[i]`."""

    relations: tuple[str, ...]
    path: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.relations)

    @property
    def answer(self) -> str:
        return self.path[-1]


@dataclass(frozen=True, kw_only=True)
class FactBase:
    """The facts of a world and their wording.

    Attributes:
        relations: by name.
        objects: (subject, relation) → object.
        with_article: names that take "the" inside a sentence.
        prefix: of passage ids.
    """

    relations: Mapping[str, Relation]
    objects: Mapping[tuple[str, str], str]
    with_article: frozenset[str] = frozenset()
    prefix: str = ""

    def named(self, name: str) -> str:
        """The name as it stands inside a sentence."""
        return f"the {name}" if name in self.with_article else name

    def sentence(self, subject: str, relation: str) -> str:
        """One fact as a sentence."""
        found = self.objects[subject, relation]
        text = self.relations[relation].sentence.format(subject=self.named(subject), object=self.named(found))
        return text[0].upper() + text[1:]

    def phrase(self, subject: str, relation: str) -> str:
        """What is looked for in one hop; `subject` is a name."""
        return self.relations[relation].phrase.format(subject=self.named(subject))

    def question(self, chain: Chain) -> str:
        """The question that the chain answers."""
        asked = self.named(chain.path[0])
        for relation in chain.relations:
            asked = self.relations[relation].phrase.format(subject=asked)
        return f"What is {asked}?"

    def passage_id(self, subject: str, relation: str) -> str:
        return f"{self.prefix}{relation}-{subject}".replace(" ", "_")

    def passages(self, rng: Random) -> list[dict[str, str]]:
        """A corpus row per fact, in random order: no order that a tie in the ranking could follow."""
        rows = [
            {"id": self.passage_id(subject, relation), "contents": f'"{subject}"\n{self.sentence(subject, relation)}'}
            for subject, relation in self.objects
        ]
        rng.shuffle(rows)
        return rows

    def chains(self, starts: Iterable[str], relations: Sequence[str]) -> list[Chain]:
        """The chains along `relations` that visit no name twice."""
        found = []
        for start in starts:
            path = [start]
            for relation in relations:
                step = self.objects.get((path[-1], relation))
                if step is None:
                    break
                path.append(step)
            else:
                if len(set(path)) == len(path):
                    found.append(Chain(relations=tuple(relations), path=tuple(path)))
        return found


def pick_chains(chains: Sequence[Chain], *, count: int, shares: Mapping[int, float], rng: Random) -> list[Chain]:
    """About `count` chains, `shares` of them per number of hops, spread evenly over the kinds of question.

    A number of hops with too few chains gives all that it has.
    """
    chosen: list[Chain] = []
    for hops, share in shares.items():
        by_kind: defaultdict[tuple[str, ...], list[Chain]] = defaultdict(list)
        for chain in chains:
            if chain.hops == hops:
                by_kind[chain.relations].append(chain)
        for group in by_kind.values():
            rng.shuffle(group)
        chosen += _take_in_turn(list(by_kind.values()), round(count * share))
    rng.shuffle(chosen)
    return chosen


def _take_in_turn(groups: list[list[Chain]], count: int) -> list[Chain]:
    taken: list[Chain] = []
    while len(taken) < count and any(groups):
        taken += [group.pop() for group in groups if group]
    return taken[:count]
