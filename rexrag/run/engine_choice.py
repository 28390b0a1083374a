"""Which engine the rollouts of a run get, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rexrag.engine.vllm_environment import INSTALL, installed_for
from rexrag.errors import ConfigError

if TYPE_CHECKING:
    from rexrag.config import Config
    from rexrag.model.loading import Device


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engine of all rollout actors; `reason` completes the sentence "it is this one, since ..."."""

    engine: Literal["torch", "vllm"]
    reason: str


def choose_engine(config: Config) -> EngineChoice:
    """What `rollout.engine` comes to in this environment.

    Raises:
        ConfigError: vLLM is asked for, or needed, and is not installed, or not the build for where the actors compute.
    """
    asked = config.rollout.engine
    device: Device = "cuda" if config.rollout.num_gpus else "cpu"
    place = "on GPUs" if config.rollout.num_gpus else "on CPUs"
    installed = installed_for()
    if asked == "torch":
        return EngineChoice(engine="torch", reason="rollout.engine says so")
    if asked == "vllm":
        if installed is None:
            raise ConfigError(f'rollout.engine = "vllm": vLLM is not installed; install it with `{INSTALL[device]}`.')
        if installed != device:
            raise ConfigError(
                f'rollout.engine = "vllm": the actors compute {place} (rollout.num_gpus = '
                f"{config.rollout.num_gpus:g}), and the build of vLLM that is installed does not; install the other "
                f"one with `{INSTALL[device]}`, or change rollout.num_gpus."
            )
        return EngineChoice(engine="vllm", reason="rollout.engine says so")
    if device == "cuda" and installed == "cuda":
        return EngineChoice(engine="vllm", reason="the actors have GPUs, and vLLM is installed")
    missing = f"vLLM is not installed (`{INSTALL[device]}`)"
    if device == "cpu":
        missing = "the actors compute on CPUs (rollout.num_gpus = 0)"
    if config.rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel = {config.rollout.tensor_parallel}: only vLLM spreads a model over devices, and "
            f'rollout.engine = "auto" comes to "torch", since {missing}.'
        )
    return EngineChoice(engine="torch", reason=missing)


def describe_engine(config: Config) -> str:
    """A line for `--dry-run`.

    Raises:
        ConfigError: as `choose_engine`.
    """
    choice = choose_engine(config)
    return f"rollout engine: {choice.engine}, since {choice.reason}"
