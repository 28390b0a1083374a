"""Both engines behind one door, for tests that ask the same of each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from plain_settings import engine_settings
from tiny_engines import V0, Letters, make_model, make_vllm_engine, needs_vllm, weights_of
from transformers import DynamicCache, PreTrainedModel

from rexrag.engine.protocol import Engine, GenerateRequest, Generation
from rexrag.engine.torch_engine import TorchEngine
from rexrag.types import WeightVersion

MAX_LENGTH = 700
T = TypeVar("T")
Inflight = Literal["keep", "recompute"]


@dataclass(frozen=True)
class Case:
    """An engine over an architecture."""

    kind: Literal["torch", "vllm"]
    architecture: str
    inflight: Inflight


def cases(*variants: tuple[str, Inflight]) -> list[Any]:
    """Each variant with each engine, as parameters."""
    return [
        pytest.param(
            Case(kind, *variant),
            id="-".join((kind, *variant)),
            marks=[pytest.mark.vllm, needs_vllm] if kind == "vllm" else [],
        )
        for kind in ("torch", "vllm")
        for variant in variants
    ]


class Pairs(Letters):
    """Each token is two characters, so that what ends a turn may begin or end within one. May be `broken`."""

    broken = False

    def decode(self, ids: Sequence[int]) -> str:
        if self.broken:
            raise LookupError("no such token")
        return "".join(f"{chr(33 + i)}{chr(300 + i)}" for i in ids)


@dataclass(kw_only=True)
class Harness:
    """An engine that tests share; `models[i]` has the weights of step i, and the engine begins with those of 0."""

    case: Case
    engine: Engine
    codec: Pairs
    models: list[PreTrainedModel]
    runner: asyncio.Runner
    _names: Iterator[int] = field(default_factory=itertools.count)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def salt(self) -> str:
        """One that no other test has."""
        return f"salt {next(self._names)}"

    async def change_to(self, step: int) -> None:
        version = WeightVersion(incarnation=V0.incarnation, step=step)
        await self.engine.update_weights(version, weights_of(self.models[step]))

    def request(self, prompt_ids: Sequence[int], **fields: Any) -> GenerateRequest:  # noqa: ANN401
        return GenerateRequest(**{"prompt_ids": prompt_ids, "max_tokens": 8, "cache_salt": self.salt(), **fields})


@contextmanager
def opened(case: Case, folder: Path, *, max_length: int = MAX_LENGTH) -> Iterator[Harness]:
    models = [make_model(case.architecture, seed=seed, head_dim=32) for seed in range(3)]
    codec = Pairs()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # else the many small passes wait for each other's threads
    engine: Engine
    if case.kind == "torch":
        settings = engine_settings(max_length=max_length, inflight=case.inflight, num_threads=1)
        engine = TorchEngine(models[0], settings=settings, codec=codec, version=V0)
    else:
        engine = make_vllm_engine(models[0], folder=folder, codec=codec, max_length=max_length, inflight=case.inflight)
    with asyncio.Runner() as runner:
        yield Harness(case=case, engine=engine, codec=codec, models=models, runner=runner)
        runner.run(engine.close())
    torch.set_num_threads(num_threads)


def incremental_logprobs(
    models: Sequence[PreTrainedModel], prompt_ids: Sequence[int], result: Generation
) -> npt.NDArray[np.float32]:
    """One pass per token over a transformers cache, each under the weights of the token that it gives."""
    cache = DynamicCache()
    inputs, logprobs = list(prompt_ids), []
    for token, version in zip(result.token_ids, result.versions, strict=True):
        with torch.inference_mode():
            logits = models[version](torch.tensor([inputs]), past_key_values=cache).logits[0, -1]
        logprobs.append(float(logits.log_softmax(-1)[token]))
        inputs = [token]
    return np.array(logprobs, dtype=np.float32)
