from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.errors import ConfigError
from rexrag.worlds import synthetic

DIALS = {name: dial.default for name, dial in synthetic.DIALS.items()}


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    relations=st.integers(3, 12),
    hops=st.integers(2, 3),
    entities=st.integers(60, 200),
    distractors=st.integers(0, 50),
)
def test_parts_share_words_but_neither_entities_nor_facts(
    seed: int, relations: int, hops: int, entities: int, distractors: int
) -> None:
    dials = DIALS | {"relations": relations, "hops": hops, "entities": entities, "distractors": distractors}
    world = synthetic.build_synthetic(dials, seed=seed)
    names = {part: {name for chain in getattr(world, part) for name in chain.path} for part in ("train", "dev", "test")}
    assert not names["train"] & (names["dev"] | names["test"])
    assert not names["dev"] & names["test"]
    assert {chain.hops for chain in world.train} == set(range(1, hops + 1))
    assert all(len(name.split()) == 2 for part in names.values() for name in part)
    first, second = ({name.split()[i] for part in names.values() for name in part} for i in (0, 1))
    assert not first & second, "a word's place in a name is fixed"


def test_hops_and_sizes_are_as_asked() -> None:
    world = synthetic.build_synthetic(DIALS, seed=0)
    hops = Counter(chain.hops for chain in world.test)
    assert len(world.test) == 200
    assert hops == {1: 50, 2: 100, 3: 50}


def test_distractors_add_passages_that_no_question_asks_for() -> None:
    with_noise = synthetic.build_synthetic(DIALS | {"distractors": 300}, seed=0)
    without = synthetic.build_synthetic(DIALS | {"distractors": 0}, seed=0)
    assert len(with_noise.facts.objects) > len(without.facts.objects) + 300


def test_seeds_make_other_worlds() -> None:
    one, same, other = (synthetic.build_synthetic(DIALS, seed=seed) for seed in (0, 0, 1))
    assert one.facts.objects == same.facts.objects
    assert one.test == same.test
    assert not set(one.facts.objects) & set(other.facts.objects)


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="words = 20 gives 400; raise words"):
        synthetic.build_synthetic(DIALS | {"words": 20}, seed=0)
