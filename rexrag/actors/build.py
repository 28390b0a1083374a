"""Builds a runner of episodes, with its engine and retriever, from plain settings in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rexrag.actors.episode import EpisodeParts, EpisodeSettings
from rexrag.actors.runner import EpisodeRunner
from rexrag.actors.scoring import Scorer
from rexrag.engine.protocol import Engine
from rexrag.engine.settings import EngineSettings
from rexrag.engine.torch_engine import TorchEngine
from rexrag.engine.vllm_engine import VllmEngine
from rexrag.engine.vllm_settings import Place
from rexrag.env.codec import Codec
from rexrag.hints import HintPool, load_hints
from rexrag.model.checks import load_codec
from rexrag.model.fetching import resolve_model
from rexrag.model.loading import Device, fastest_dtype, load_model
from rexrag.retrieval.open import open_retriever
from rexrag.retrieval.settings import RetrieverSettings
from rexrag.reward import load_reward
from rexrag.types import WeightVersion


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """All that a rollout actor, or an evaluation in this process, is built from.

    Attributes:
        gpu_share: of each GPU that the engine is on; 0 on CPUs.
        tensor_parallel: devices that it is spread over.
        log_file: an actor's `log.jsonl`.
    """

    model_path: str
    episodes: EpisodeSettings
    engine: Literal["torch", "vllm"]
    num_sequences: int
    dtype: Literal["auto", "float32", "bfloat16"]
    device: Device
    gpu_share: float
    tensor_parallel: int
    inflight: Literal["keep", "recompute"]
    num_threads: int
    retriever: RetrieverSettings
    reward_kind: str
    format_weight: float
    never_negative: bool
    hints_file: Path | None
    log_file: Path | None


def longest_sequence(episodes: EpisodeSettings, hints: HintPool) -> int:
    """Most tokens that the engine may have to read and write in one sequence."""
    # A target that is scored with a hint in it, and the one token that the engine writes after it.
    extra = hints.longest + 1 if episodes.scored == "all" else 0
    return episodes.max_trajectory_tokens + extra


def build_runner(settings: RolloutSettings, *, version: WeightVersion) -> tuple[EpisodeRunner, Engine]:
    """The runner and its engine, whose weights are those of the model folder, called `version`."""
    codec = load_codec(settings.model_path)
    episodes = settings.episodes
    hints = load_hints(settings.hints_file, codec=codec, removable=episodes.scored != "none")
    retriever = open_retriever(settings.retriever)  # before the engine: it is the quicker one to fail
    engine = _build_engine(settings, codec=codec, max_length=longest_sequence(episodes, hints), version=version)
    reward = load_reward(
        settings.reward_kind, format_weight=settings.format_weight, never_negative=settings.never_negative
    )
    parts = EpisodeParts(
        engine=engine,
        retriever=retriever,
        codec=codec,
        hints=hints,
        scorer=Scorer(reward, kind=settings.reward_kind),
        settings=episodes,
    )
    return EpisodeRunner(parts), engine


def sampling_dtype(settings: RolloutSettings) -> Literal["float32", "bfloat16"]:
    """The precision that an actor samples in; `auto` is the faster one where this runs."""
    return fastest_dtype(settings.device) if settings.dtype == "auto" else settings.dtype


def _build_engine(settings: RolloutSettings, *, codec: Codec, max_length: int, version: WeightVersion) -> Engine:
    dtype = sampling_dtype(settings)
    plain = EngineSettings(
        max_sequences=settings.num_sequences + 1,  # the canary of new weights waits for no episode
        max_length=max_length,
        dtype=dtype,
        inflight=settings.inflight,
        num_threads=settings.num_threads,
        device=settings.device,
    )
    if settings.engine == "vllm":
        folder = resolve_model(settings.model_path)
        place = Place(gpu_share=settings.gpu_share, tensor_parallel=settings.tensor_parallel)
        return VllmEngine(folder, settings=plain, place=place, codec=codec, version=version)
    model = load_model(settings.model_path, dtype=dtype)
    return TorchEngine(model, settings=plain, codec=codec, version=version)
