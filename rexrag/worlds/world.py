"""A world before it is written: facts, questions in three parts, and what the demonstrations are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.worlds.chains import Chain, FactBase


@dataclass(frozen=True, kw_only=True)
class World:
    """Facts and the chains that are asked for.

    Attributes:
        train, dev, test: chains of the three question files.
        shown: chains that demonstrations are made of, all from the training part.
        attribution: whose data the facts are; empty for invented ones.
    """

    name: str
    facts: FactBase
    train: Sequence[Chain]
    dev: Sequence[Chain]
    test: Sequence[Chain]
    shown: Sequence[Chain]
    attribution: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class WorldFiles:
    """What `write_world` has written; `counts` are rows by file name without its ending."""

    folder: Path
    corpus: Path
    train: Path
    dev: Path
    test: Path
    demonstrations: Path
    info: Path
    dials: Mapping[str, float]
    counts: Mapping[str, int]
