"""Which questions are asked next: those that are asked again first, then one epoch after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rexrag.buffer.ledger import Ledger
from rexrag.buffer.schedule import issue_order


class Asked(NamedTuple):
    """A question's turn: in which epoch, and how often it was asked there before."""

    epoch: int
    question: str
    attempt: int


class QuestionLine:
    """The questions in the order of their turns.

    Args:
        ledger: what was asked already; what is to be asked again is looked up there each time.
    """

    def __init__(self, ledger: Ledger, *, questions: Iterable[str], seed: int) -> None:
        self._ledger = ledger
        self._questions = tuple(questions)
        self._seed = seed
        self.epoch = max(0, ledger.first_open_epoch - 1, *ledger.asked)
        self._line = deque(
            (epoch, question)
            for epoch in range(ledger.first_open_epoch, self.epoch + 1)
            for question in issue_order(self._questions, seed=seed, epoch=epoch)
            if question not in ledger.asked.get(epoch, ())
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(epoch, question) of those whose first turn in the epochs begun so far is to come."""
        return iter(self._line)

    def next(self, num: int) -> list[Asked]:
        """The next `num` turns; they are over when `advance` is told of them."""
        turns = [Asked(epoch, question, attempt) for (epoch, question), attempt in self._ledger.again.items()][:num]
        num_first = num - len(turns)
        while len(self._line) < num_first:
            self.epoch += 1
            order = issue_order(self._questions, seed=self._seed, epoch=self.epoch)
            self._line.extend((self.epoch, question) for question in order)
        return turns + [Asked(*self._line[index], 0) for index in range(num_first)]

    def advance(self, turns: Iterable[Asked]) -> None:
        """These turns were taken, in their order."""
        for turn in turns:
            if self._line and self._line[0] == turn[:2]:
                self._line.popleft()
