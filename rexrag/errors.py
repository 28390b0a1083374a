"""Exceptions that cross module and process boundaries, and words for messages. All pickle, since Ray carries them."""

from __future__ import annotations


class RexragError(Exception):
    """Base of all errors of this package."""


class UserError(RexragError, ValueError):
    """A mistake of the user's: the message names the value, the bound, and what to do. Exit status 2."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of bounds, or at odds with another one."""


class DataError(UserError):
    """A question, corpus, demonstration or hint file that cannot be used as it is."""


class RetrievalIndexError(UserError):
    """An index folder that is missing, damaged, or does not fit its corpus."""


class ModelError(UserError):
    """A model folder that cannot be loaded or does not fit the limits asked of it."""


class RunFolderError(UserError):
    """A run folder that is in use, finished, of another version, or otherwise refuses the call."""


class RunFailure(RexragError):
    """The run cannot go on: a part died or gave no progress. Exit status 1."""


class StalledError(RunFailure):
    """What the run waited for has made no progress for too long."""


class EngineBrokenError(RunFailure):
    """An actor's engine is dead, or fails again and again: the actor is to be built anew. The message has the cause."""


class EnginePassError(RexragError):
    """A forward pass of an engine failed, and with it all that it computed. The message has the cause."""


class CollapsedError(RunFailure):
    """The policy breaks (`rexrag.run.guard`). `first_bad`: the first step in which it may have."""

    def __init__(self, message: str, first_bad: int = 0) -> None:
        super().__init__(message, first_bad)
        self.first_bad = first_bad

    def __str__(self) -> str:
        return str(self.args[0])


class PartDiedError(RunFailure):
    """The process of a part died while somebody waited for it."""


class RetrieverSetupError(RunFailure):
    """The search server is not what the settings say: no access, no such path, another API. Every search would fail."""


class Interrupted(RexragError):
    """The run was asked to stop and has checkpointed. Exit status 130."""


class RetrieverError(RexragError):
    """The retriever gave no result in the end: the episode is masked, never fed an empty result."""


class QueryRefusedError(RexragError):
    """The search server refuses this query (too long, say) and would answer another: the model's doing, no outage."""


class Overloaded(RexragError):
    """A search service has no room for another query. `retry_after_s`: when there should be some, an estimate."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SearchTimeoutError(RexragError):
    """A search service had no answer within the time that its caller gave it."""


class UnknownLeaseError(RexragError):
    """An append or a renewal for a group that was never issued, or whose lease has ended for good."""


class StaleGroupError(RexragError):
    """A group older than the staleness bound reached the learner: an invariant is broken."""


def first_line(error: BaseException) -> str:
    """What an error says first, its kind where it says nothing: libraries follow it with pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(number: float, noun: str, nouns: str | None = None) -> str:
    """A number with its noun: 1 actor, 2 actors, 0.5 actors; `nouns` is a plural that is not the noun and an s."""
    shown = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun if number == 1 else nouns or f'{noun}s'}"
