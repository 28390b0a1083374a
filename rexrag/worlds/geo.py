"""Questions of one to three hops about real countries and cities.

The countries are split into three parts. A question belongs to the part of the country that it starts in, and no
training question passes through a country of another part, so what is asked in the end was never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from random import Random
from typing import Final

from rexrag.worlds.chains import Chain, FactBase, Relation, pick_chains
from rexrag.worlds.dials import Dial
from rexrag.worlds.world import World

DIALS: Final[dict[str, Dial]] = {
    "train": Dial(default=2000, low=8, high=5000, meaning="training questions"),
    "dev": Dial(default=64, low=8, high=2000, meaning="questions on the dev countries"),
    "test": Dial(default=240, low=8, high=2000, meaning="questions on the test countries"),
    "demonstrations": Dial(default=320, low=1, high=20000, meaning="demonstrations for the supervised start"),
    "top_k": Dial(default=2, low=1, high=20, meaning="passages per search in the demonstrations"),
    "decision_weight": Dial(
        default=0.0, low=0.0, high=1.0, whole=False, meaning="weight of the token that goes on: depth of the dead end"
    ),
    "dev_countries": Dial(default=0.08, low=0.02, high=0.4, whole=False, meaning="share of countries kept for dev"),
    "test_countries": Dial(default=0.24, low=0.02, high=0.4, whole=False, meaning="share of countries kept for test"),
    "one_hop": Dial(default=0.2, low=0.0, high=0.9, whole=False, meaning="share of one-hop questions in dev and test"),
    "train_one_hop": Dial(default=0.1, low=0.0, high=0.9, whole=False, meaning="share of one-hop questions in train"),
}  # fmt: skip

RELATIONS: Final = {
    "country": Relation(sentence="{subject} is a city in {object}.", phrase="the country of the city {subject}"),
    "capital": Relation(sentence="the capital of {subject} is {object}.", phrase="the capital of {subject}"),
    "currency": Relation(sentence="the currency of {subject} is the {object}.", phrase="the currency of {subject}"),
    "language": Relation(sentence="the language of {subject} is {object}.", phrase="the language of {subject}"),
    "continent": Relation(sentence="the continent of {subject} is {object}.", phrase="the continent of {subject}"),
    "domain": Relation(
        sentence="the internet domain of {subject} is {object}.", phrase="the internet domain of {subject}"
    ),
    "neighbour": Relation(
        sentence="the largest neighbour of {subject} is {object}.", phrase="the largest neighbour of {subject}"
    ),
}
OF_COUNTRIES: Final = ("capital", "currency", "language", "continent", "domain")
WITH_ARTICLE: Final = frozenset(
    {
        "Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo", "Dominican Republic",
        "Gambia", "Maldives", "Netherlands", "Philippines", "Republic of the Congo", "Solomon Islands",
        "United Arab Emirates", "United Kingdom", "United States",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The facts as they are shipped."""

    countries: tuple[Mapping[str, str], ...]
    cities: Mapping[str, str]
    attribution: tuple[str, ...]


def build_geo(dials: Mapping[str, float], *, seed: int) -> World:
    """The world of the given dials; another seed splits the countries otherwise."""
    rng = Random(f"geo {seed}")
    table = _load_table()
    facts = FactBase(relations=RELATIONS, objects=_objects(table), with_article=WITH_ARTICLE, prefix="geo-")
    chains = _all_chains(facts, table)
    parts = _split(chains, table, dials=dials, rng=rng)
    evaluated = _hop_shares(dials["one_hop"])
    return World(
        name="geo",
        facts=facts,
        train=pick_chains(
            parts["train"], count=int(dials["train"]), shares=_hop_shares(dials["train_one_hop"]), rng=rng
        ),
        dev=pick_chains(parts["dev"], count=int(dials["dev"]), shares=evaluated, rng=rng),
        test=pick_chains(parts["test"], count=int(dials["test"]), shares=evaluated, rng=rng),
        shown=parts["train"],
        attribution=table.attribution,
    )


def _load_table() -> _Table:
    raw = json.loads((resources.files("rexrag.worlds") / "facts.json").read_text(encoding="utf-8"))
    return _Table(countries=tuple(raw["countries"]), cities=raw["cities"], attribution=tuple(raw["attribution"]))


def _objects(table: _Table) -> dict[tuple[str, str], str]:
    objects = {(city, "country"): country for city, country in table.cities.items()}
    for country in table.countries:
        for relation in (*OF_COUNTRIES, "neighbour"):
            if relation in country:
                objects[country["name"], relation] = country[relation]
    return objects


def _all_chains(facts: FactBase, table: _Table) -> list[Chain]:
    cities = list(table.cities)
    countries = [country["name"] for country in table.countries]
    kinds: list[tuple[list[str], tuple[str, ...]]] = [(cities, ("country",))]
    kinds += [(countries, (last,)) for last in (*OF_COUNTRIES, "neighbour")]
    kinds += [(cities, ("country", last)) for last in (*OF_COUNTRIES, "neighbour")]
    kinds += [(countries, ("neighbour", last)) for last in OF_COUNTRIES]
    kinds += [(cities, ("country", "neighbour", last)) for last in OF_COUNTRIES]
    return [chain for starts, relations in kinds for chain in facts.chains(starts, relations)]


def _split(chains: list[Chain], table: _Table, *, dials: Mapping[str, float], rng: Random) -> dict[str, list[Chain]]:
    """Chains by the part of the country they start in.

    Only test chains may pass through countries of other parts, and dev chains through those of train.
    """
    names = [country["name"] for country in table.countries]
    rng.shuffle(names)
    num_dev, num_test = round(len(names) * dials["dev_countries"]), round(len(names) * dials["test_countries"])
    dev, test = set(names[:num_dev]), set(names[num_dev : num_dev + num_test])
    parts: dict[str, list[Chain]] = {"train": [], "dev": [], "test": []}
    for chain in chains:
        owner = table.cities.get(chain.path[0], chain.path[0])
        passed = {owner, *chain.path[:-1]}
        if owner in test:
            parts["test"].append(chain)
        elif owner in dev and not passed & test:
            parts["dev"].append(chain)
        elif not passed & (dev | test):
            parts["train"].append(chain)
    return parts


def _hop_shares(one_hop: float) -> dict[int, float]:
    """The rest is three hops to a third."""
    return {1: one_hop, 2: (1.0 - one_hop) * 2 / 3, 3: (1.0 - one_hop) / 3}
