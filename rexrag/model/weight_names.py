"""Whether the weights of a file are those of a model: none missing, none of another shape, none left over."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Final

from rexrag.errors import ModelError, counted

LOG = logging.getLogger(__name__)
_NUM_SHOWN: Final = 3


def compare_names(*, missing: Iterable[str], unexpected: Iterable[str], where: object) -> None:
    """Refuse missing weights, which would be random ones; tell which ones are not used.

    Raises:
        ModelError: a weight is missing.
    """
    absent, extra = sorted(missing), sorted(unexpected)
    if absent:
        raise ModelError(
            f"{where} has no weights for {counted(len(absent), 'parameter')} of the model: {_shown(absent)}"
            f"{_explained(absent, extra)}; they would be random: save the model anew, or correct config.json"
        )
    if extra:
        spare = counted(len(extra), "weight")
        LOG.warning("%s: %s not used, being none of the model's: %s", where, spare, _shown(extra))


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, where: object
) -> None:
    """Refuse weights of another size than the configuration's.

    Raises:
        ModelError: the first weight of another shape.
    """
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            raise ModelError(
                f"{where}: weight {name} has the shape {found[name]}, by config.json it has {wanted[name]}; "
                "weights and config.json are of different models: fetch both anew"
            )


def _explained(missing: list[str], unexpected: list[str]) -> str:
    """What the names that are there say about those that are not."""
    if not unexpected:
        return ""
    for absent in missing:
        for there in unexpected:
            if there.endswith(f".{absent}"):
                return f' (all the same with "{there.removesuffix(absent)}" before the name, as a wrapper saves it)'
            if absent.endswith(f".{there}"):
                return f' (all the same without "{absent.removesuffix(there)}" before the name)'
    return f" (there are instead {_shown(unexpected)})"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
