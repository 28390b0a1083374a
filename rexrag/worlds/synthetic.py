"""An invented world: nothing in it can be known from before, and no fact of training returns in the test.

Entities have names of two invented words. The words are shared by all parts, so that a model made for this world
knows each of them; the entities and facts of train, dev and test are different ones in one corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Final

from rexrag.errors import ConfigError
from rexrag.worlds.chains import Chain, FactBase, Relation, pick_chains
from rexrag.worlds.dials import Dial
from rexrag.worlds.world import World

MAX_RELATIONS: Final = 12

DIALS: Final[dict[str, Dial]] = {
    "train": Dial(default=2000, low=8, high=100000, meaning="training questions"),
    "dev": Dial(default=64, low=8, high=5000, meaning="questions on the dev entities"),
    "test": Dial(default=200, low=8, high=5000, meaning="questions on the test entities"),
    "demonstrations": Dial(default=3000, low=1, high=100000, meaning="demonstrations for the supervised start"),
    "top_k": Dial(default=2, low=1, high=20, meaning="passages per search in the demonstrations"),
    "decision_weight": Dial(
        default=0.002, low=0.0, high=1.0, whole=False, meaning="weight of the token that goes on: depth of the dead end"
    ),
    "entities": Dial(default=400, low=60, high=5000, meaning="entities of train; dev and test have a half each"),
    "distractors": Dial(default=100, low=0, high=5000, meaning="entities with passages that no question asks for"),
    "relations": Dial(default=8, low=3, high=MAX_RELATIONS, meaning="kinds of facts"),
    "hops": Dial(default=3, low=2, high=3, meaning="longest chain"),
    "words": Dial(default=48, low=20, high=200, meaning="first words of names, and as many second words"),
    "one_hop": Dial(default=0.25, low=0.0, high=0.9, whole=False, meaning="share of one-hop questions in dev and test"),
    "train_one_hop": Dial(default=0.1, low=0.0, high=0.9, whole=False, meaning="share of one-hop questions in train"),
}  # fmt: skip

_TYPED: Final = (
    ("film", "director", "person"), ("person", "birthplace", "city"), ("city", "mayor", "person"),
    ("person", "employer", "company"), ("company", "founder", "person"), ("film", "studio", "company"),
    ("city", "river", "river"), ("company", "seat", "city"), ("person", "spouse", "person"),
    ("film", "star", "person"), ("city", "twin", "city"), ("company", "rival", "company"),
)  # fmt: skip
"""(type of the subject, relation, type of the object); the first n make chains of three hops for every n >= 3."""

_TYPE_SHARES: Final = {"film": 0.25, "person": 0.35, "city": 0.2, "company": 0.15, "river": 0.05}


def build_synthetic(dials: Mapping[str, float], *, seed: int) -> World:
    """The world of the given dials."""
    rng = Random(f"synthetic {seed}")
    typed = _TYPED[: int(dials["relations"])]
    relations = {
        name: Relation(sentence=f"the {name} of {{subject}} is {{object}}.", phrase=f"the {name} of {{subject}}")
        for _, name, _ in typed
    }
    names = _names(int(dials["words"]), rng)
    sizes = {"train": int(dials["entities"]), "dev": int(dials["entities"]) // 2, "test": int(dials["entities"]) // 2}
    sizes["noise"] = int(dials["distractors"])
    if sum(sizes.values()) > len(names):
        raise _too_few_names(dials, needed=sum(sizes.values()), available=len(names))
    objects: dict[tuple[str, str], str] = {}
    entities: dict[str, dict[str, list[str]]] = {}
    for part, size in sizes.items():
        entities[part] = _entities([names.pop() for _ in range(size)])
        objects.update(_facts(entities[part], typed, rng))
    facts = FactBase(relations=relations, objects=objects, prefix="synthetic-")
    parts = {
        part: _all_chains(facts, entities[part], typed, hops=int(dials["hops"])) for part in ("train", "dev", "test")
    }
    evaluated = _hop_shares(dials["one_hop"], int(dials["hops"]))
    trained = _hop_shares(dials["train_one_hop"], int(dials["hops"]))
    return World(
        name="synthetic",
        facts=facts,
        train=pick_chains(parts["train"], count=int(dials["train"]), shares=trained, rng=rng),
        dev=pick_chains(parts["dev"], count=int(dials["dev"]), shares=evaluated, rng=rng),
        test=pick_chains(parts["test"], count=int(dials["test"]), shares=evaluated, rng=rng),
        shown=parts["train"],
        attribution=(),
    )


def _names(num_words: int, rng: Random) -> list[str]:
    """All names of a first and a second word, in random order; no word is in both places."""
    words = _invented_words(2 * num_words, rng)
    names = [f"{first} {second}" for first, second in product(words[:num_words], words[num_words:])]
    rng.shuffle(names)
    return names


def _invented_words(count: int, rng: Random) -> list[str]:
    """Different capitalised words of two syllables."""
    starts = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "st", "tr")
    ends = ("", "n", "r", "s", "l", "th", "m", "x", "d")
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.choice(starts) + rng.choice("aeiou") for _ in range(2)) + rng.choice(ends)
        if word.capitalize() not in words:
            words.append(word.capitalize())
    return words


def _too_few_names(dials: Mapping[str, float], *, needed: int, available: int) -> ConfigError:
    return ConfigError(
        f"dials entities = {dials['entities']} and distractors = {dials['distractors']} need {needed} names, "
        f"words = {dials['words']} gives {available}; raise words or lower the others"
    )


def _entities(names: list[str]) -> dict[str, list[str]]:
    """The names shared out over the types of entities; no type is empty unless there are no names."""
    entities: dict[str, list[str]] = {}
    start = 0.0
    for kind, share in _TYPE_SHARES.items():
        end = start + share * len(names)
        entities[kind] = names[round(start) : round(end)]
        start = end
    return entities


def _facts(
    entities: Mapping[str, Sequence[str]], typed: Sequence[tuple[str, str, str]], rng: Random
) -> dict[tuple[str, str], str]:
    """One object per entity and relation that its type has, never the entity itself."""
    facts: dict[tuple[str, str], str] = {}
    for subject_type, relation, object_type in typed:
        for subject in entities[subject_type]:
            others = [name for name in entities[object_type] if name != subject]
            if others:
                facts[subject, relation] = rng.choice(others)
    return facts


def _all_chains(
    facts: FactBase, entities: Mapping[str, Sequence[str]], typed: Sequence[tuple[str, str, str]], *, hops: int
) -> list[Chain]:
    kinds: list[tuple[str, tuple[str, ...], str]] = [(start, (name,), end) for start, name, end in typed]
    chains: list[Chain] = []
    for _ in range(hops):
        chains += [chain for start, names, _ in kinds for chain in facts.chains(entities[start], names)]
        kinds = [
            (start, (*names, name), last)
            for start, names, end in kinds
            for subject_type, name, last in typed
            if subject_type == end
        ]
    return chains


def _hop_shares(one_hop: float, hops: int) -> dict[int, float]:
    """Of the rest two thirds are two hops and one third three, if there are three."""
    rest = 1.0 - one_hop
    return {1: one_hop, 2: rest} if hops == 2 else {1: one_hop, 2: rest * 2 / 3, 3: rest / 3}
