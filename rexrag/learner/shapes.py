"""Shapes of what public functions get: one that does not fit is named, with its size and the one that it must have."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Protocol

from rexrag.errors import counted


class Shaped(Protocol):
    """A tensor or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def require_shape(like: Shaped, *, name: str, **others: Shaped) -> None:
    """Refuse values of another shape than those called `name`.

    Raises:
        ValueError: the first of them.
    """
    wanted = tuple(like.shape)
    for other, values in others.items():
        if tuple(values.shape) != wanted:
            raise ValueError(f"{other} has the shape {tuple(values.shape)}, it must have that of {name}, {wanted}")


def require_length(length: int, columns: Mapping[str, Sized], *, name: str) -> None:
    """Refuse columns that have not one entry for each of `name`.

    Raises:
        ValueError: the first of them.
    """
    for column, values in columns.items():
        if len(values) != length:
            raise ValueError(
                f"{column} has {counted(len(values), 'entry', 'entries')}, it must have {length}, one for each of "
                f"{name}"
            )
