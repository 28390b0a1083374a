"""The embedded generation engine: continuous batching of a small Llama-like model, on CPU or one GPU.

    generate ──▶ scheduler ──plan──▶ forward pass in a worker thread ──▶ sampled tokens ──▶ finished generations
                    ▲                                                                          │
                    └──────── the next turn, submitted while the loop yields ◀─────────────────┘

Between two passes the event loop runs a few rounds, so that whoever gets a result and answers without real waiting
(retrieval in this process) is in the next pass: the course of a run depends on the order of requests alone.

Weights change between two passes (§3). With `keep` running sequences go on over the keys and values they have: each
recorded log-prob is that of the distribution which was sampled from, part old and part new. With `recompute` all
keys and values are void: before its next token a sequence is prefilled again, and from there on its log-probs equal
those of a full forward pass under the new weights. Tokens that were sampled before keep their log-prob and version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rexrag.engine.model_pass import ModelPass, Outcome
from rexrag.engine.protocol import (
    EngineClosedError,
    EngineStats,
    Finish,
    GenerateRequest,
    Generation,
    TokenText,
)
from rexrag.engine.requests import Endings, check_request
from rexrag.engine.scheduler import LiveSequence, Scheduler
from rexrag.engine.settings import EngineSettings
from rexrag.errors import EngineBrokenError, EnginePassError
from rexrag.types import WeightVersion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_TOKENS: Final = {"cpu": 512, "cuda": 4096}
"""Most prompt tokens of one pass: large enough for full speed, small enough that decoding goes on."""

_YIELDS: Final = 8
"""Rounds of the event loop between two passes: a result passes a few tasks until it becomes the next request."""

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class TorchEngine:
    """Implements `rexrag.engine.protocol.Engine` over a transformers model, whose weights are copied.

    Life cycle: the first request starts the loop; `close` ends it and fails what is still pending.

    Example:
        >>> engine = TorchEngine(model, settings=settings, codec=codec, version=version)
        >>> generation = await engine.generate(GenerateRequest(prompt_ids=[1, 2], max_tokens=8))  # doctest: +SKIP
    """

    def __init__(
        self, model: PreTrainedModel, *, settings: EngineSettings, codec: TokenText, version: WeightVersion
    ) -> None:
        """
        Raises:
            ModelError: the architecture is not supported, or the model's context is shorter than `max_length`.
        """
        self._settings = settings
        self._version = version
        self._endings = Endings(codec)
        self._scheduler = Scheduler(num_slots=settings.max_sequences, prefill_tokens=_PREFILL_TOKENS[settings.device])
        self._pass = ModelPass(
            model,
            num_slots=settings.max_sequences,
            max_length=settings.max_length,
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
        )
        self._futures: dict[LiveSequence, asyncio.Future[Generation]] = {}
        # One thread for all passes: torch keeps a pool of workers for each thread that computes.
        self._executor = ThreadPoolExecutor(1, "engine")
        if settings.num_threads is not None:
            self._executor.submit(torch.set_num_threads, settings.num_threads)
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._pass_lock = asyncio.Lock()
        self._closed = False
        self._broken: str | None = None
        self._sampled_tokens = 0

    @property
    def version(self) -> WeightVersion:
        return self._version

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one continuation; a cancelled call leaves the batch before the next pass.

        Raises:
            ValueError: the prompt is empty, does not fit with `max_tokens`, or has a token id out of range; or
                `score_from` is not within it.
            EngineClosedError: the engine is closed, or was before the end.
            EnginePassError: the pass that computed it failed, for all its requests.
            EngineBrokenError: new weights could not all be loaded.
        """
        check_request(request, max_length=self._settings.max_length, vocab_size=self._pass.weights.shape.vocab_size)
        self._refuse_if_over()
        sequence = LiveSequence.of(request)
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._futures[sequence] = future
        self._scheduler.add(sequence)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="torch-engine")
        return await future

    async def update_weights(
        self, version: WeightVersion, weights: Mapping[str, npt.NDArray[np.generic]] | None
    ) -> float:
        """Swap the weights between two passes.

        Args:
            weights: by the names of the model's `named_parameters()` (a tied head is left out), float32, or
                bfloat16 as the uint16 that hold its bits. None: the weights stay, only their version changes.

        Returns:
            Seconds between the two passes.

        Raises:
            ValueError: a name is missing or unknown, or an array has another shape or type. Nothing has changed then.
            EngineClosedError: the engine is closed.
            EngineBrokenError: they could not all be loaded, and the engine is of no use any more.
        """
        if weights is not None:
            self._pass.weights.check(weights)
        self._refuse_if_over()
        async with self._pass_lock:
            began = time.monotonic()
            if weights is not None:
                await self._load(weights, version)
            self._version = version
            if weights is not None and self._settings.inflight == "recompute":
                self._scheduler.invalidate()
            return time.monotonic() - began

    async def _load(self, weights: Mapping[str, npt.NDArray[np.generic]], version: WeightVersion) -> None:
        try:
            await self._in_thread(self._pass.weights.load, weights)
        except Exception as error:  # fault boundary: they are loaded one after the other, some of them are the new ones
            self._broken = f"the engine failed to load {version}, and holds a mixture of weights: {error!r}"
            self._fail_all(EngineBrokenError(self._broken))
            raise EngineBrokenError(self._broken) from error

    def _refuse_if_over(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._broken is not None:
            raise EngineBrokenError(self._broken)

    async def bit_sum(self) -> int | None:
        """Read between two passes."""
        async with self._pass_lock:
            return await self._in_thread(self._pass.weights.bit_sum)

    def release(self, cache_salt: str) -> None:
        self._scheduler.release(cache_salt)

    def stats(self) -> EngineStats:
        return EngineStats(
            sampled_tokens=self._sampled_tokens,
            prefilled_tokens=self._pass.prefilled_tokens,
            reused_tokens=self._scheduler.reused_tokens,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            forward_s=self._pass.forward_s,
            cache_use=self._scheduler.num_running / self._settings.max_sequences,
        )

    async def close(self) -> None:
        """End after the pass that is under way."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._fail_all(EngineClosedError("the engine was closed"))
        self._executor.shutdown()

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            for _ in range(_YIELDS):
                await asyncio.sleep(0)
            self._drop_cancelled()
            if not self._futures:
                self._wake.clear()
                continue
            try:
                async with self._pass_lock:
                    await self._step()
            except Exception as error:
                # Fault boundary: whoever waits gets the error, and the next pass begins anew.
                LOG.exception("a forward pass failed")
                self._fail_all(EnginePassError(f"a forward pass failed: {error!r}"))

    async def _step(self) -> None:
        """One pass, and what came out of it handed to its requests, in order of admission."""
        plan = self._scheduler.plan()
        if not plan.spans:
            return
        outcomes = await self._in_thread(self._pass.run, plan)
        for span, outcome in zip(plan.spans, outcomes, strict=True):
            self._scheduler.advance(span)
            self._record(span.sequence, outcome)

    def _record(self, sequence: LiveSequence, outcome: Outcome) -> None:
        step = self._version.step
        if outcome.scores:
            sequence.scores = outcome.scores
            sequence.score_versions = [step] * len(outcome.scores)
        if outcome.token_id is None:
            return
        sequence.token_ids.append(outcome.token_id)
        sequence.logprobs.append(outcome.logprob)
        sequence.versions.append(step)
        self._sampled_tokens += 1
        finish = self._endings.finish_of(sequence.sampled_ids, request=sequence.request)
        if finish is None:
            return
        self._scheduler.finish(sequence)
        future = self._futures.pop(sequence)
        if not future.done():
            future.set_result(_generation(sequence, finish))

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence, future in self._futures.items() if future.done()]:
            del self._futures[sequence]
            self._scheduler.drop(sequence)

    def _fail_all(self, error: Exception) -> None:
        """Every pending request ends with this error; nothing that the cache holds is trusted any more."""
        for sequence, future in self._futures.items():
            self._scheduler.drop(sequence)
            if not future.done():
                future.set_exception(error)
        self._futures.clear()
        self._scheduler.invalidate()


def _generation(sequence: LiveSequence, finish: Finish) -> Generation:
    return Generation(
        token_ids=sequence.sampled_ids,
        logprobs=sequence.logprobs,
        versions=sequence.versions,
        finish=finish,
        scores=sequence.scores,
        score_versions=sequence.score_versions,
    )
