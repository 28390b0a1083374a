"""The pool of exploration hints, and the density of drawing one (§4)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

import numpy as np

from rexrag.env.codec import Codec
from rexrag.errors import DataError, counted
from rexrag.files import lines_of, read_user_text
from rexrag.types import FloatArray, IntArray

DEFAULT_HINTS: Final = (
    "<think> | That is only one step. The next step is to find",
    "<think> | This is just part of what is asked. I still need",
    "<think> | The question wants more than this. I have to look up",
    "<think> | I may have stopped too early. Now I should find",
    "<think> | Let me read the question again. What is still missing is",
    "<think> | This does not settle the question yet. Next I need",
    "<think> | It is too soon to answer. First I must know",
    "<think> | These passages may have left something out. I should look for",
    "<think> | I should not guess here. Let me search for",
    "<think> | My last query may have been poor. Instead I could ask for",
)
"""Half sentences that the policy completes: what the next step is has to come from the policy itself.

As in a file of hints: what stands before "|" stays where a hint is taken out of a rollout again (§5b).
"""

_SEPARATOR: Final = "|"
_THINK_TAG: Final = re.compile(r"<(/?)think>")
_FORBIDDEN_TAG: Final = re.compile(r"<[\s/]*(?:search|answer|information|action)[\s/]*>", re.IGNORECASE)


class HintPool:
    """K hints as token ids, drawn uniformly, with the log PMF of each token given the tokens before it.

        pool = HintPool([[5, 7], [5, 7, 9], [5, 8]])
        pool.logpmf(0)      # log [3/3, 2/3 * 1/2]: continuation, then continuation times end

    Hints may repeat (a repeated hint is drawn more often) and may be prefixes of one another. One without tokens is a
    fork without a hint; `find` does not find it, so exact weights cannot be had with it.

    Attributes:
        longest: tokens of the longest hint.
        hash: SHA-256 of the hints' token ids, in order: runs with the same hash may share densities.
    """

    def __init__(self, hints: Sequence[Sequence[int]], *, kept: Sequence[int] | None = None) -> None:
        """
        Args:
            kept: of each hint how many of its first tokens stay when it is taken out of a rollout (§5b); None: 0.

        Raises:
            DataError: no hint, or one that would keep more than it has.
        """
        if not hints:
            raise DataError("the hint pool is empty, it needs at least one hint")
        self._hints = tuple(tuple(int(token) for token in hint) for hint in hints)
        self._kept = (0,) * len(hints) if kept is None else tuple(kept)
        if len(self._kept) != len(hints):
            raise DataError(
                f"kept has {counted(len(self._kept), 'entry', 'entries')}, the pool has {counted(len(hints), 'hint')}"
            )
        for index, (hint, count) in enumerate(zip(self._hints, self._kept, strict=True)):
            if not 0 <= count <= len(hint):
                raise DataError(f"hint {index} has {counted(len(hint), 'token')}, it cannot keep {count} of them")
        self.longest: int = max(map(len, self._hints))
        self.hash: str = hashlib.sha256(json.dumps(self._hints).encode()).hexdigest()
        self._trie = _Trie(self._hints)
        self._logpmf = tuple(self._trie.logpmf(hint) for hint in self._hints)

    def __len__(self) -> int:
        return len(self._hints)

    @property
    def has_empty(self) -> bool:
        """Whether one of the hints is none: no tokens."""
        return () in self._hints

    def ids(self, index: int) -> tuple[int, ...]:
        """Token ids of a hint."""
        return self._hints[index]

    def kept(self, index: int) -> int:
        """How many of a hint's first tokens stay when it is taken out of a rollout (§5b)."""
        return self._kept[index]

    def logpmf(self, index: int) -> FloatArray:
        """[len(hint)] log PMF(c_t | c_<t) of a hint's tokens, the last one with its end factor; read-only.

        The sum is log(number of hints equal to this one / K).
        """
        return self._logpmf[index]

    def log_probability(self, index: int) -> float:
        """Log of the probability that a drawn hint has the tokens of this one: log(number of equal hints / K)."""
        return math.log(self._hints.count(self._hints[index]) / len(self._hints))

    def sample(self, rng: Random) -> int:
        """Index of a hint, uniform over the pool."""
        return rng.randrange(len(self._hints))

    def find(self, token_ids: Sequence[int] | IntArray) -> list[tuple[int, int]]:
        """All (position, hint) at which exactly the ids of a hint stand, by position, shorter hints first.

        Of equal hints the first one is named.
        """
        tokens = np.asarray(token_ids)
        starts = np.flatnonzero(np.isin(tokens, self._trie.first_tokens))
        return [
            (start, hint)
            for start in starts.tolist()
            for hint in self._trie.prefixes_of(tokens[start : start + self.longest].tolist())
        ]


def load_hints(path: Path | None, *, codec: Codec, removable: bool = False) -> HintPool:
    """The pool of a file, one hint a line, or the built-in one for None.

    Blank lines and lines that begin with "#" are skipped, white space around a hint is dropped. Of a hint with a "|"
    the text before it stays, as if the policy had written it, when the hint is taken out of a rollout again; without
    one all of it goes. A "|" alone is no hint: the rollout is forked, and the policy goes on by itself.

    Args:
        removable: hints will be taken out: refuse those that would leave broken text behind.

    Raises:
        DataError: no readable UTF-8 file, no hint in it, a hint with an action tag or a special token, or one whose
            "|" parts a thought's tags.
    """
    if path is None:
        return _pool([(f"built-in hint {i}", hint) for i, hint in enumerate(DEFAULT_HINTS)], codec, removable)
    try:
        lines = lines_of(read_user_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"probe.hints = {path} cannot be read: {error}") from error
    numbered = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, start=1)]
    hints = [(where, hint) for where, hint in numbered if hint and hint[0] != "#"]
    if not hints:
        raise DataError(f"{path} has no hint, it needs at least one; write one a line, or unset probe.hints")
    for where, hint in hints:
        _check_hint(hint, where=where, codec=codec)
    return _pool(hints, codec, removable)


def _pool(hints: Sequence[tuple[str, str]], codec: Codec, removable: bool) -> HintPool:
    ids, kept = [], []
    for where, hint in hints:
        opening, _, rest = hint.rpartition(_SEPARATOR)
        opening, rest = opening.strip(), rest.strip()
        if removable:
            _check_removable(rest, where=where)
        stays = codec.encode(opening) if opening else []
        goes = codec.encode(f" {rest}" if opening and rest else rest) if rest else []
        ids.append([*stays, *goes])
        kept.append(len(stays))
    return HintPool(ids, kept=kept)


def _check_hint(hint: str, *, where: str, codec: Codec) -> None:
    found = _FORBIDDEN_TAG.search(hint)
    forbidden = found[0] if found else next((token for token in codec.special_tokens if token in hint), None)
    if forbidden is not None:
        raise DataError(
            f"{where}: hint {hint!r} contains {forbidden!r}; a hint is a thought, the policy acts by itself"
        )
    if hint.count(_SEPARATOR) > 1:
        raise DataError(f'{where}: hint {hint!r} has more than one "{_SEPARATOR}"; one parts what stays from what goes')


def _check_removable(goes: str, *, where: str) -> None:
    """A thought that only opens or only closes in what is taken out would leave its other tag behind."""
    depth = 0
    for tag in _THINK_TAG.finditer(goes):
        depth += -1 if tag[1] else 1
        if depth < 0:
            break
    if depth:
        raise DataError(
            f'{where}: with probe.transfer = "hint_free" {goes!r} is taken out, and a <think> or </think> without '
            f'its other half with it; put "{_SEPARATOR}" after the tag that has to stay'
        )


class _Trie:
    """Token trie of the pool: how many hints pass through each node, and how many end there."""

    def __init__(self, hints: Sequence[tuple[int, ...]]) -> None:
        self._child: dict[tuple[int, int], int] = {}  # (node, token) -> node; node 0 is the empty prefix
        self._num_through: list[int] = [0]
        self._num_ending: list[int] = [0]
        self._first_hint: dict[int, int] = {}  # node -> first hint that ends there
        for index, hint in enumerate(hints):
            node = 0
            self._num_through[0] += 1
            for token in hint:
                node = self._child.setdefault((node, token), len(self._num_through))
                if node == len(self._num_through):
                    self._num_through.append(0)
                    self._num_ending.append(0)
                self._num_through[node] += 1
            self._num_ending[node] += 1
            self._first_hint.setdefault(node, index)
        self.first_tokens = np.array([token for node, token in self._child if node == 0])

    def logpmf(self, hint: Sequence[int]) -> FloatArray:
        nodes = [0, *self._path(hint)]
        counts = np.array([self._num_through[node] for node in nodes], dtype=np.float64)
        counts_with_end = np.append(counts[1:-1], self._num_ending[nodes[-1]])
        logpmf: FloatArray = np.log(counts_with_end / counts[:-1]).astype(np.float32)
        logpmf.flags.writeable = False
        return logpmf

    def prefixes_of(self, tokens: Sequence[int]) -> Iterator[int]:
        """The hints that `tokens` begins with, shortest first."""
        return (self._first_hint[node] for node in self._path(tokens) if node in self._first_hint)

    def _path(self, tokens: Sequence[int]) -> Iterator[int]:
        """The nodes that `tokens` leads through, as far as the trie goes."""
        node = 0
        for token in tokens:
            child = self._child.get((node, token))
            if child is None:
                return
            yield child
            node = child
