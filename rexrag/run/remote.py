"""Calls of Ray actors that a reader and a type checker can follow to the method that runs.

result = call(learner, LearnerActor.step, value_of(batch))      # learner.step.remote(batch)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast, overload

from ray import ObjectRef
from ray.actor import ActorHandle

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


def value_of(ref: Ref[T]) -> T:
    """A reference as an argument of `call`: Ray hands the actor its value, without a way through this process."""
    return cast("T", ref)
