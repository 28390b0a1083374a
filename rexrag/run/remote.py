"""Calls of Ray actors that a reader and a type checker can follow to the method that runs.

result = call(learner, LearnerActor.step, value_of(batch))      # learner.step.remote(batch)
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar, cast, overload

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rexrag.errors import PartDiedError, RexragError, RunFailure
from rexrag.run.signals import StopSignal

_POLL_S: Final = 0.5
_DEATHS: Final = (RayActorError, NodeDiedError, OutOfMemoryError, ObjectLostError)
"""What Ray says of a process that is no more: also where its memory monitor has killed it, and where the node has gone
that held what it had made."""

T = TypeVar("T")
ActorT = TypeVar("ActorT")
P = ParamSpec("P")

Handle: TypeAlias = ActorHandle[ActorT]
"""An actor, by the class that runs in its process."""
Ref: TypeAlias = ObjectRef[T]
"""A value that an actor has made, or will have made."""


@overload
def call(
    actor: Handle[ActorT], method: Callable[Concatenate[ActorT, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> Ref[T]: ...


@overload
def call(
    actor: Handle[ActorT], method: Callable[Concatenate[ActorT, P], T], *args: P.args, **kwargs: P.kwargs
) -> Ref[T]: ...


def call(
    actor: Handle[ActorT], method: Callable[Concatenate[ActorT, P], Any], *args: P.args, **kwargs: P.kwargs
) -> Ref[Any]:
    """Start a method of an actor; the reference resolves to what it returns.

    Args:
        method: of the actor's class, such as `LearnerActor.step`.
    """
    ref: Ref[Any] = getattr(actor, method.__name__).remote(*args, **kwargs)
    return ref


def result_of(ref: Ref[T], *, what: str) -> T:
    """The value behind a reference, waited for; errors of this package as what they are.

    Args:
        what: who waits for what, for the message.

    Raises:
        PartDiedError: the process that makes it died.
        RunFailure: it failed, or Ray lost it.
    """
    try:
        value: T = ray.get(ref)
        return value
    except RayTaskError as error:
        if isinstance(error.cause, RexragError):
            raise error.cause from None
        if isinstance(error.cause, _DEATHS):  # of who was to make one of its arguments
            raise PartDiedError(f"{what}: its process died: {error.cause}") from error
        raise RunFailure(f"{what}: {error.cause!r}") from error
    except _DEATHS as error:
        raise PartDiedError(f"{what}: its process died: {error}") from error
    except RayError as error:
        raise RunFailure(f"{what}: Ray lost it ({type(error).__name__}): {error}") from error


def peek(ref: Ref[T], *, timeout_s: float = 5.0) -> T | None:
    """The value behind a reference that should be there soon; None where it is not, or never will be."""
    try:
        value: T = ray.get(ref, timeout=timeout_s)
        return value
    except RayError:
        return None


def is_done(ref: Ref[T], *, timeout_s: float = 0.0) -> bool:
    """Whether there is a value behind a reference, or an error, within a time."""
    return bool(ray.wait([ref], timeout=timeout_s)[0])


def is_done_in(ref: Ref[T], *, timeout_s: float, what: str, stop: StopSignal) -> bool:
    """Whether there is a value behind a reference, or an error, within a time.

    Args:
        what: who waits for what, for the message.

    Raises:
        Interrupted: a stop signal came meanwhile.
    """
    until = time.monotonic() + timeout_s
    while not is_done(ref, timeout_s=min(_POLL_S, max(0.0, until - time.monotonic()))):
        stop.heed(f": {what}")
        if time.monotonic() >= until:
            return False
    return True


def kill(actor: Handle[ActorT]) -> None:
    """End an actor for good."""
    ray.kill(actor)


def value_of(ref: Ref[T]) -> T:
    """A reference as an argument of `call`: Ray hands the actor its value, without a way through this process."""
    return cast("T", ref)
