"""What every engine asks of a request, and when a generation ends."""

from __future__ import annotations

from collections.abc import Sequence

from rexrag.engine.protocol import Finish, GenerateRequest, TokenText
from rexrag.engine.stops import StopFinder
from rexrag.errors import counted


def check_request(request: GenerateRequest, *, max_length: int, vocab_size: int) -> None:
    """Refuse what cannot be served.

    Args:
        max_length: most tokens of a sequence, prompt included.

    Raises:
        ValueError: the prompt is empty, does not fit with `max_tokens`, or has a token id out of range; or
            `score_from` is not within it.
    """
    length = len(request.prompt_ids)
    if not length:
        raise ValueError("prompt_ids is empty; a generation needs at least one token")
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens is {request.max_tokens}, it must be at least 1")
    if length + request.max_tokens > max_length:
        raise ValueError(
            f"{counted(length, 'prompt token')} and max_tokens {request.max_tokens} exceed max_length {max_length}"
        )
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
        raise ValueError(f"prompt_ids has a token outside [0, {vocab_size})")
    if request.score_from is not None and not 1 <= request.score_from <= length:
        raise ValueError(f"score_from {request.score_from} is outside [1, {length}]; the first token has no score")


class Endings:
    """Says whether the newest sampled token ends a generation, and why."""

    def __init__(self, codec: TokenText) -> None:
        self._codec = codec
        self._stops = StopFinder(codec.decode)

    def finish_of(self, sampled_ids: Sequence[int], *, request: GenerateRequest) -> Finish | None:
        """None: the generation goes on. The tokens before the newest are known not to end it."""
        if sampled_ids[-1] in self._codec.eos_ids:
            return "eos"
        if request.stop and self._stops.completes(sampled_ids, request.stop):
            return "stop"
        return "length" if len(sampled_ids) == request.max_tokens else None
