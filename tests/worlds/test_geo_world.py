from __future__ import annotations

import json
from collections import Counter
from importlib import resources

import pytest

from rexrag.worlds import geo
from rexrag.worlds.chains import Chain
from rexrag.worlds.world import World

DIALS = {name: dial.default for name, dial in geo.DIALS.items()}


@pytest.fixture(scope="module")
def world() -> World:
    return geo.build_geo(DIALS, seed=0)


def test_facts_are_attributed_plain_and_closed() -> None:
    table = json.loads((resources.files("rexrag.worlds") / "facts.json").read_text(encoding="utf-8"))
    countries = {country["name"]: country for country in table["countries"]}
    assert any("GeoNames" in line and "CC BY 4.0" in line for line in table["attribution"])
    assert len(countries) == len(table["countries"]) == 163
    assert set(table["cities"].values()) <= set(countries)
    for name, country in countries.items():
        assert country.get("neighbour", name) in countries
        assert country.get("neighbour") != name
        assert country.get("capital", "Paris") in table["cities"]
        assert all(value.isascii() and value == value.strip() for value in country.values())


def test_facts_are_true(world: World) -> None:
    objects = world.facts.objects
    assert objects["France", "capital"] == "Paris"
    assert objects["Japan", "currency"] == "Yen"
    assert objects["United Kingdom", "domain"] == ".uk"
    assert objects["Homs", "country"] == "Syria"
    assert objects["Portugal", "neighbour"] == "Spain"
    # The largest neighbour has no facts of its own here, and the second largest must not stand in for it.
    assert ("Turkmenistan", "neighbour") not in objects


def test_sentences_and_questions_read_as_people_write(world: World) -> None:
    facts = world.facts
    assert facts.sentence("Homs", "country") == "Homs is a city in Syria."
    assert facts.sentence("Bahamas", "capital") == "The capital of the Bahamas is Nassau."
    assert facts.sentence("Canada", "neighbour") == "The largest neighbour of Canada is the United States."
    chain = Chain(
        relations=("country", "neighbour", "currency"), path=("Ottawa", "Canada", "United States", "US Dollar")
    )
    assert facts.question(chain) == "What is the currency of the largest neighbour of the country of the city Ottawa?"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_are_apart_and_large_enough(seed: int) -> None:
    world = geo.build_geo(DIALS, seed=seed)
    cities = {subject: found for (subject, relation), found in world.facts.objects.items() if relation == "country"}

    def owners(chains: list[Chain]) -> set[str]:
        return {cities.get(chain.path[0], chain.path[0]) for chain in chains}

    train, dev, test = (owners(list(chains)) for chains in (world.train, world.dev, world.test))
    assert not train & dev
    assert not train & test
    assert not dev & test
    for chain in (*world.train, *world.shown):
        assert not {cities.get(name, name) for name in chain.path[:-1]} & (dev | test), "trained on a held-out country"
    hops = Counter(chain.hops for chain in world.test)
    assert len(world.test) >= 200
    assert hops[1] >= 40
    assert hops[2] > hops[3] > 0
    assert len(world.dev) >= 60
    assert len(set(world.test)) == len(world.test)


def test_chains_follow_the_facts_and_never_return(world: World) -> None:
    for chain in (*world.train, *world.dev, *world.test):
        assert len(set(chain.path)) == chain.hops + 1
        for subject, relation, found in zip(chain.path, chain.relations, chain.path[1:], strict=False):
            assert world.facts.objects[subject, relation] == found


def test_another_seed_splits_otherwise(world: World) -> None:
    assert geo.build_geo(DIALS, seed=0).test == world.test
    assert geo.build_geo(DIALS, seed=1).test != world.test
