"""Whether the limits of a run leave room for what it is to do: prompt and turn, hint and turn, all in the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rexrag.actors.build import longest_sequence
from rexrag.config import Config
from rexrag.env.prompt import render_prompt
from rexrag.errors import ConfigError, counted
from rexrag.hints import HintPool
from rexrag.model.checks import CheckedModel
from rexrag.model.supported import check_context
from rexrag.model.weight_proof import Canary, canary_of
from rexrag.run.part_settings import episode_settings
from rexrag.types import Question

CANARY_QUESTIONS: Final = 16
"""Of the first questions the canary is chosen."""


def check_limits(config: Config, *, model: CheckedModel, hints: HintPool, questions: Sequence[Question]) -> None:
    """Refuse limits under which no rollout, or no probe, could be of use.

    Args:
        questions: to train on; the shortest one is written as a prompt.

    Raises:
        UserError: the context is too small for a trajectory and what is scored of it, no turn fits behind the
            shortest prompt, no probe fits a turn, or the chat template fails on a question.
    """
    env = config.env
    episodes = episode_settings(config)
    needed = longest_sequence(episodes, hints)
    extra = needed - env.max_trajectory_tokens
    scored = f" (env.max_trajectory_tokens {env.max_trajectory_tokens} and {extra} for a scored hint)" if extra else ""
    check_context(model.config, needed, what=f"the run{scored}")
    shortest = min((question.question for question in questions), key=len, default="?")
    prompt = render_prompt(
        shortest, codec=model.codec, template=episodes.prompt_template, system_prompt=episodes.system_prompt
    )
    if len(prompt) >= env.max_trajectory_tokens:
        raise ConfigError(
            f"env.max_trajectory_tokens = {env.max_trajectory_tokens}: the prompt of the shortest question has "
            f"{counted(len(prompt), 'token')} already, and no turn fits; raise it, or shorten env.prompt_file"
        )
    if config.probe.rate > 0:
        _check_probes(config, hints=hints, prompt=len(prompt))


def canary_prompts(config: Config, *, model: CheckedModel, questions: Sequence[Question]) -> Canary:
    """Of the first questions, by which engines prove what weights they hold."""
    episodes = episode_settings(config)
    return canary_of(
        [
            render_prompt(
                question.question,
                codec=model.codec,
                template=episodes.prompt_template,
                system_prompt=episodes.system_prompt,
            )
            for question in questions[:CANARY_QUESTIONS]
        ]
    )


def _check_probes(config: Config, *, hints: HintPool, prompt: int) -> None:
    """A fork at the start of the first turn asks for the least: hint and room to go on within a turn, then a turn."""
    env = config.env
    if not env.max_turns:
        raise ConfigError(
            "env.max_turns = 0: a probe has one more turn than the rollout that it forks, so that no rollout could be "
            "probed; raise it, or set probe.rate = 0"
        )
    room = max(1, env.max_turn_tokens // 8)
    if hints.longest + room > env.max_turn_tokens:
        raise ConfigError(
            f"env.max_turn_tokens = {env.max_turn_tokens}: the longest hint has {counted(hints.longest, 'token')} "
            f"and {room} more "
            "are needed to go on: no rollout could be probed; raise it, shorten the hints, or set probe.rate = 0"
        )
    least = prompt + hints.longest + env.max_turn_tokens
    if least > env.max_trajectory_tokens:
        raise ConfigError(
            f"env.max_trajectory_tokens = {env.max_trajectory_tokens}: the shortest prompt "
            f"({counted(prompt, 'token')}), the "
            f"longest hint ({hints.longest}) and a turn ({env.max_turn_tokens}) need {least}, so that no rollout could "
            "be probed; raise it, lower env.max_turn_tokens, or set probe.rate = 0"
        )
