"""The engine over vLLM: everything larger than a quick start, on GPUs or CPUs.

    generate ──▶ requests that are new ─┐
                                        ├─▶ one pass of vLLM's core, in a thread ──▶ tokens ──▶ finished generations
    cancelled, stopped ─────────────────┘

One event loop holds all state, one thread runs vLLM, one pass at a time: weights change, requests come and go between
two passes, as in the torch engine, whose promises about weight changes (§3) hold here, too.

vLLM gives log-probs of prompt tokens only where it computes them: tokens that it has cached have none. A request for
scores reads the cached prefix, and where that reaches into what is to be scored, it is asked again without the cache.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from transformers import PreTrainedConfig

from rexrag.engine.protocol import EngineClosedError, EngineStats, Finish, GenerateRequest, Generation, TokenText
from rexrag.engine.requests import Endings, check_request
from rexrag.engine.settings import EngineSettings
from rexrag.engine.shared_weights import SharedWeights, in_shared_memory
from rexrag.engine.vllm_environment import prepare
from rexrag.engine.vllm_settings import Place, check_heads, core_settings, parameter_sizes, reason_of
from rexrag.engine.vllm_types import CoreOutput, CorePass, CoreRequest
from rexrag.engine.weight_arrays import check_arrays
from rexrag.errors import EngineBrokenError, EnginePassError, RunFailure
from rexrag.model.loading import load_config
from rexrag.model.supported import check_context
from rexrag.model.weight_proof import Weights, bit_sum
from rexrag.types import WeightVersion

if TYPE_CHECKING:
    from rexrag.engine.vllm_core import VllmCore

_YIELDS: Final = 8
"""Rounds of the event loop between two passes: a result passes a few tasks until it becomes the next request."""

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, kw_only=True)
class _Live:
    """A request on its way; `future` is done early when its caller has gone."""

    core: CoreRequest
    future: asyncio.Future[Generation]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    score_version: int = 0

    @property
    def request(self) -> GenerateRequest:
        return self.core.request

    @property
    def num_scores(self) -> int:
        request = self.request
        return 0 if request.score_from is None else len(request.prompt_ids) - request.score_from

    def generation(self, finish: Finish) -> Generation:
        return Generation(
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            versions=self.versions,
            finish=finish,
            scores=self.scores,
            score_versions=[self.score_version] * len(self.scores),
        )


class VllmEngine:
    """Implements `rexrag.engine.protocol.Engine` over vLLM, which loads the weights of a model folder.

    Life cycle: the first request starts the loop; `close` ends it and fails what is still pending. At most one is
    open in a process.

    Example:
        >>> engine = VllmEngine(  # doctest: +SKIP
        ...     folder, settings=settings, place=Place(), codec=codec, version=version
        ... )
        >>> generation = await engine.generate(GenerateRequest(prompt_ids=[1, 2], max_tokens=8))  # doctest: +SKIP
    """

    def __init__(
        self, folder: Path, *, settings: EngineSettings, place: Place, codec: TokenText, version: WeightVersion
    ) -> None:
        """
        Raises:
            ModelError: the model's context is shorter than `max_length`, or vLLM cannot run its heads there.
            RunFailure: vLLM refuses the settings or the model; the message has its reason.
        """
        config = load_config(folder)
        check_context(config, settings.max_length)
        check_heads(config, device=settings.device, tensor_parallel=place.tensor_parallel)
        self._settings = settings
        self._version = version
        self._endings = Endings(codec)
        self._sizes = parameter_sizes(config)
        self._vocab_size = int(config.vocab_size)
        self._keys = itertools.count()
        self._is_spread = place.tensor_parallel > 1
        self._keeps_bits: bool | None = None
        self._salts: dict[str, str] = {}
        self._live: dict[str, _Live] = {}
        self._added: list[CoreRequest] = []
        self._dropped: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._pass_lock = asyncio.Lock()
        self._closed = False
        self._dead: str | None = None
        self._last: CorePass | None = None
        self._sampled_tokens = self._prefilled_tokens = self._reused_tokens = 0
        self._forward_s = 0.0
        self._executor = ThreadPoolExecutor(1, "vllm")
        self._core = self._start(folder, config, place=place, eos_ids=codec.eos_ids)

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
            EngineBrokenError: the engine is dead; the message says of what.
        """
        check_request(request, max_length=self._settings.max_length, vocab_size=self._vocab_size)
        self._refuse_if_over()
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        live = _Live(core=self._core_request(request), future=future)
        self._enter(live)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="vllm-engine")
        return await future

    async def update_weights(self, version: WeightVersion, weights: Weights | None) -> float:
        """Swap the weights between two passes.

        Args:
            weights: by the names of the transformers model's `named_parameters()` (a tied head is left out), float32,
                or bfloat16 as the uint16 that hold its bits. None: the weights stay, only their version changes.

        Returns:
            Seconds between the two passes.

        Raises:
            ValueError: a name is missing or unknown, or an array has another shape or type. Nothing has changed then.
            EngineClosedError: the engine is closed.
            EngineBrokenError: they could not be loaded, and the engine is dead: nobody knows what it holds.
        """
        if weights is not None:
            check_arrays(weights, sizes=self._sizes)
        self._refuse_if_over()
        with ExitStack() as stack:
            arrays: Weights | SharedWeights | None = weights
            if weights is not None and self._is_spread:  # beside the passes: only the reading is a pause
                arrays = await asyncio.to_thread(stack.enter_context, in_shared_memory(weights))
            async with self._pass_lock:
                self._refuse_if_over()  # it may have ended meanwhile
                began = time.monotonic()
                if arrays is not None:
                    await self._load(arrays, version)
                self._version = version
                return time.monotonic() - began

    async def bit_sum(self) -> int | None:
        """Of the weights in vLLM's layers.

        None where no load has shown yet that they are the bits they were loaded with: vLLM repacks them for CPUs, and
        over several processes some are there more than once.
        """
        if not self._keeps_bits:
            return None
        async with self._pass_lock:
            self._refuse_if_over()
            return await self._in_thread(self._core.bit_sum)

    def release(self, cache_salt: str) -> None:
        """Entries of the salt are not found again, and make room as others need it."""
        self._salts.pop(cache_salt, None)

    def stats(self) -> EngineStats:
        last = self._last if self._live else None
        running = min(last.num_running, len(self._live)) if last is not None else 0
        return EngineStats(
            sampled_tokens=self._sampled_tokens,
            prefilled_tokens=self._prefilled_tokens,
            reused_tokens=self._reused_tokens,
            running=running,
            waiting=len(self._live) - running,
            forward_s=self._forward_s,
            cache_use=last.cache_use if last is not None else 0.0,
            preemptions=self._last.preemptions if self._last is not None else 0,
        )

    async def close(self) -> None:
        """End after the pass that is under way."""
        first = not self._closed
        self._closed = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._fail_all(EngineClosedError("the engine was closed"))
        if first:
            await self._in_thread(self._core.close)
        self._executor.shutdown()

    def _start(self, folder: Path, config: PreTrainedConfig, *, place: Place, eos_ids: frozenset[int]) -> VllmCore:
        prepare(self._settings.device)
        from rexrag.engine.vllm_core import VllmCore  # reads the environment as it is now

        settings = core_settings(folder, config=config, settings=self._settings, place=place, eos_ids=eos_ids)
        try:
            return self._executor.submit(VllmCore, settings).result()
        except Exception as error:  # noqa: BLE001
            # Fault boundary: vLLM's own errors cannot be pickled, and follow their reason with pages.
            self._executor.shutdown()
            raise RunFailure(f"vLLM does not start with {folder}: {reason_of(error)}") from None

    async def _load(self, weights: Weights | SharedWeights, version: WeightVersion) -> None:
        self._restart_scoring()
        try:
            await self._in_thread(self._core.load, weights, forget=self._settings.inflight == "recompute")
            if not isinstance(weights, SharedWeights):
                await self._compare_bits(weights)
        except Exception as error:
            self._die(f"the weights of {version} could not be loaded: {error!r}")
            raise EngineBrokenError(self._dead) from error

    async def _compare_bits(self, weights: Weights) -> None:
        """Whether vLLM keeps the bits it was given: looked at until it does, on CPUs, where it repacks them, once."""
        is_cpu, is_first = self._settings.device == "cpu", self._keeps_bits is None
        has_same_type = all((array.itemsize == 2) == (self._settings.dtype == "bfloat16") for array in weights.values())
        if self._keeps_bits or not has_same_type or (is_cpu and not is_first):
            return
        there = await self._in_thread(self._core.bit_sum)
        self._keeps_bits = there == await asyncio.to_thread(bit_sum, weights.values())
        if not self._keeps_bits and is_first:
            told = "vLLM's layers do not hold the bits they were given: new weights are told by the canary alone"
            LOG.log(logging.INFO if is_cpu else logging.WARNING, "%s", told)

    def _core_request(self, request: GenerateRequest, *, reads_cache: bool = True) -> CoreRequest:
        salt = request.cache_salt
        if salt not in self._salts:
            # The version at its group's start; and a number, since a salt may come again after its release.
            self._salts[salt] = f"{self._version.incarnation}/{self._version.step}/{next(self._keys)}/{salt}"
        return CoreRequest(
            key=str(next(self._keys)),
            request=request,
            salt=self._salts[salt],
            scored=request.score_from is not None and request.score_from < len(request.prompt_ids),
            reads_cache=reads_cache,
        )

    def _enter(self, live: _Live) -> None:
        self._live[live.core.key] = live
        self._added.append(live.core)

    def _leave(self, key: str) -> _Live:
        """The core lets go of a request before the next pass."""
        self._dropped.append(key)
        return self._live.pop(key)

    def _again(self, live: _Live, *, reads_cache: bool) -> None:
        """Begin a request anew that has given nothing yet; its draws are the same."""
        self._leave(live.core.key)
        live.core = replace(live.core, key=str(next(self._keys)), reads_cache=reads_cache)
        self._enter(live)

    def _restart_scoring(self) -> None:
        """All scores of a request are of one version: what was computed of them before a weight change is not used."""
        for live in list(self._live.values()):
            if live.core.scored and not live.token_ids:
                self._again(live, reads_cache=live.core.reads_cache)

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            for _ in range(_YIELDS):
                await asyncio.sleep(0)
            self._drop_cancelled()
            if self._dead is not None or not (self._live or self._dropped):
                self._wake.clear()
                continue
            async with self._pass_lock:
                try:
                    await self._step()
                except Exception as error:
                    # Fault boundary: whoever waits gets the error, and the next pass begins anew.
                    LOG.exception("a pass of vLLM failed")
                    await self._recover(error)

    async def _step(self) -> None:
        """One pass, and what came out of it handed to its requests."""
        added, self._added = self._added, []
        dropped, self._dropped = self._dropped, []
        kept = [request for request in added if request.key in self._live]
        self._last = await self._in_thread(self._core.run_pass, added=kept, dropped=dropped)
        self._forward_s += self._last.forward_s
        for output in self._last.outputs:
            live = self._live.get(output.key)
            if live is not None:
                self._record(live, output)

    def _record(self, live: _Live, output: CoreOutput) -> None:
        self._prefilled_tokens += output.prefilled
        self._reused_tokens += output.reused
        if live.core.scored and not live.token_ids and not self._take_scores(live, output):
            return
        for token_id, logprob in zip(output.token_ids, output.logprobs, strict=True):
            if not math.isfinite(logprob):
                raise FloatingPointError(f"the log-prob of token {token_id} is {logprob}: the weights have diverged")
            live.token_ids.append(token_id)
            live.logprobs.append(logprob)
            live.versions.append(self._version.step)
            self._sampled_tokens += 1
            finish = self._endings.finish_of(live.token_ids, request=live.request)
            if finish is not None:
                self._finish(live, finish, ended=output.ended)
                return

    def _take_scores(self, live: _Live, output: CoreOutput) -> bool:
        """False: too much of the prompt was cached, and the request was put in again, to compute all of it."""
        if len(output.scores) < live.num_scores:
            if not live.core.reads_cache:
                raise RuntimeError(f"vLLM gave {len(output.scores)} of {live.num_scores} scores without its cache")
            self._again(live, reads_cache=False)
            return False
        scores = output.scores[-live.num_scores :]
        if not all(map(math.isfinite, scores)):
            raise FloatingPointError("a log-prob of the prompt is not finite: the weights have diverged")
        live.scores, live.score_version = scores, self._version.step
        return True

    def _finish(self, live: _Live, finish: Finish, *, ended: bool) -> None:
        del self._live[live.core.key]
        if not ended:
            self._dropped.append(live.core.key)
        if not live.future.done():
            live.future.set_result(live.generation(finish))

    def _drop_cancelled(self) -> None:
        for key in [key for key, live in self._live.items() if live.future.done()]:
            self._leave(key)

    async def _recover(self, error: Exception) -> None:
        keys = [*self._live, *self._dropped]
        self._fail_all(EnginePassError(f"a pass of vLLM failed: {reason_of(error)}"))
        try:
            await self._in_thread(self._core.reset, keys)
        except Exception as second:
            # Fault boundary: the core cannot even forget its requests.
            LOG.exception("vLLM does not recover")
            self._die(f"vLLM did not recover from {error!r}: {second!r}")

    def _die(self, why: str) -> None:
        """Nothing that the core says is trusted any more; whoever waits, or comes, is told why."""
        self._dead = f"the engine is dead: {why}"
        self._fail_all(EngineBrokenError(self._dead))

    def _fail_all(self, error: Exception) -> None:
        for live in self._live.values():
            if not live.future.done():
                live.future.set_exception(error)
        self._live.clear()
        self._added.clear()
        self._dropped.clear()

    def _refuse_if_over(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")
        if self._dead is not None:
            raise EngineBrokenError(self._dead)

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))
