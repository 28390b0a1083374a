"""The dials of a world: bounds, defaults, and how a caller's values are checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from rexrag.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Dial:
    """One dial. `whole` ones take integers only."""

    default: float
    low: float
    high: float
    meaning: str
    whole: bool = True


def resolve_dials(dials: Mapping[str, Dial], size: Mapping[str, float], *, kind: str) -> dict[str, float]:
    """All dials with their values: those of `size`, else the defaults.

    Raises:
        ConfigError: an unknown dial (the nearest known one is named), or a value out of bounds.
    """
    for name, value in size.items():
        if name not in dials:
            near = difflib.get_close_matches(name, dials, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"world {kind} has no dial {name!r}, did you mean {near!r}? It has {', '.join(sorted(dials))}"
            )
        dial = dials[name]
        if not dial.low <= value <= dial.high or (dial.whole and value != int(value)):
            form = "a whole number" if dial.whole else "a number"
            raise ConfigError(
                f"dial {name} = {value} of world {kind} must be {form} in [{dial.low}, {dial.high}]: {dial.meaning}"
            )
    values = {name: size.get(name, dial.default) for name, dial in dials.items()}
    return {name: int(value) if dials[name].whole else float(value) for name, value in values.items()}
