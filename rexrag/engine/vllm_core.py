"""vLLM's engine core, driven pass by pass in this process. The only module that knows vLLM's classes.

Not `LLMEngine`: its detokeniser stops at texts, and it gives out what the core gives, later. Here each pass hands over
its tokens at once, so that stops, versions and scores are those of the torch engine.

All of it runs in the one thread that built it: vLLM and OpenMP keep state per thread.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.executor import Executor

from rexrag.engine.shared_weights import SharedWeights
from rexrag.engine.vllm_draws import count_draws
from rexrag.engine.vllm_types import CoreOutput, CorePass, CoreRequest, CoreSettings
from rexrag.engine.weight_arrays import as_tensor
from rexrag.model.weight_proof import Weights, bit_sum

_CPU_BLOCK: Final = 32
"""Tokens of a cache block on CPUs, the smallest for which vLLM's attention there is fast."""


_HEALTH_TIMEOUT_S: Final = 10.0


class VllmCore:
    """Life cycle: `run_pass` again and again, `load` between two of them, `close`."""

    def __init__(self, settings: CoreSettings) -> None:
        """
        Raises:
            Exception: of any kind: vLLM refuses the settings or the model.
        """
        self._eos_ids = sorted(settings.eos_ids)
        with _own_threads(settings.num_threads):
            config = engine_args(settings).create_engine_config(UsageContext.ENGINE_CONTEXT)
            self._client: Any = InprocClient(config, Executor.get_class(config), log_stats=True)
        if not settings.gpu_share:
            self._client.collective_rpc(lambda worker: count_draws(worker.model_runner))
        self._preemptions = 0

    def run_pass(self, *, added: Iterable[CoreRequest], dropped: Iterable[str]) -> CorePass:
        """Drop and add requests, then compute one pass; without outputs where there is nothing to do."""
        began = time.monotonic()
        self._client.abort_requests(list(dropped))
        for request in added:
            self._client.add_request(self._core_request(request))
        produced = self._client.get_output()
        outputs = [self._output(output) for output in produced.outputs]
        stats = produced.scheduler_stats
        return CorePass(
            outputs=outputs,
            num_running=stats.num_running_reqs if stats is not None else 0,
            cache_use=stats.kv_cache_usage if stats is not None else 0.0,
            preemptions=self._preemptions,
            forward_s=time.monotonic() - began,
        )

    def load(self, weights: Weights | SharedWeights, *, forget: bool) -> None:
        """Replace all weights.

        Args:
            weights: where there are several processes, such that each can map them.
            forget: cached keys and values are void, and running requests are prefilled again.

        Raises:
            RuntimeError: a weight of vLLM's model was not among them: it would keep its old value.
        """
        self._client.collective_rpc(lambda worker: _load(worker, weights))
        if forget:
            self._client.reset_prefix_cache(reset_running_requests=True)

    def bit_sum(self) -> int | None:
        """Of the parameters as they lie in the layers; None where there are others than of two or four bytes."""
        (total,) = self._client.collective_rpc(_bit_sum)
        return None if total is None else int(total)

    def reset(self, dropped: Iterable[str]) -> None:
        """After a pass that failed: requests end, and nothing that is cached is trusted any more.

        Raises:
            Exception: of any kind: a process of the engine is dead or does not answer.
        """
        self._client.collective_rpc("check_health", timeout=_HEALTH_TIMEOUT_S)
        self._client.abort_requests(list(dropped))
        self._client.reset_prefix_cache(reset_running_requests=True)

    def num_unfinished(self) -> int:
        """Requests that the core still holds."""
        return int(self._client.engine_core.scheduler.get_num_unfinished_requests())

    def close(self) -> None:
        self._client.shutdown()
        gc.collect()  # the core and its workers hold each other: weights and cache would stay

    def _core_request(self, added: CoreRequest) -> EngineCoreRequest:
        request = added.request
        params = SamplingParams(
            temperature=0.0 if request.greedy else 1.0,
            seed=None if request.greedy else request.seed,
            max_tokens=request.max_tokens,
            stop_token_ids=self._eos_ids,
            ignore_eos=True,  # the tokenizer's own may be one of several
            logprobs=0,
            prompt_logprobs=0 if added.scored else None,
            skip_reading_prefix_cache=not added.reads_cache,
            detokenize=False,
        )
        return EngineCoreRequest(
            request_id=added.key,
            prompt_token_ids=list(request.prompt_ids),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=added.salt,
            data_parallel_rank=None,
        )

    def _output(self, output: EngineCoreOutput) -> CoreOutput:
        events = output.events or ()
        self._preemptions += sum(event.type == EngineCoreEventType.PREEMPTED for event in events)
        prefill = output.prefill_stats
        reused = prefill.num_cached_tokens if prefill is not None else 0
        prefilled = prefill.num_computed_tokens if prefill is not None else 0
        scores = output.new_prompt_logprobs_tensors
        return CoreOutput(
            key=output.request_id,
            token_ids=list(output.new_token_ids),
            logprobs=[] if output.new_logprobs is None else output.new_logprobs.logprobs[:, 0].tolist(),
            ended=output.finish_reason is not None,
            reused=reused,
            prefilled=prefilled,
            scores=[] if scores is None else _computed(scores.logprobs[:, 0], num=prefilled - 1),
        )


def _computed(scores: Tensor, *, num: int) -> list[float]:
    """The last `num` scores: one runner gives those of all tokens, where the cached ones are undefined memory."""
    return [float(score) for score in scores[max(0, len(scores) - num) :]]


def engine_args(settings: CoreSettings) -> EngineArgs:
    on_cpu = not settings.gpu_share
    return EngineArgs(
        model=settings.model,
        skip_tokenizer_init=True,
        generation_config="vllm",  # a model's own temperature or penalties are none of ours
        dtype=settings.dtype,
        seed=0,
        max_model_len=settings.max_length,
        max_num_seqs=settings.max_sequences,
        max_num_batched_tokens=max(settings.prefill_tokens, settings.max_sequences),
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        # A pass that runs ahead of its tokens would see new weights in the middle.
        async_scheduling=False,
        logprobs_mode="processed_logprobs",
        # Compiling takes longer than it saves on CPUs.
        enforce_eager=on_cpu,
        tensor_parallel_size=settings.tensor_parallel,
        # In a Ray actor vLLM would ask Ray for placement groups: its GPUs are those of the actor.
        distributed_executor_backend="uni" if settings.tensor_parallel == 1 else "mp",
        block_size=_CPU_BLOCK if on_cpu else None,
        kv_cache_memory_bytes=settings.cache_bytes,
        **({} if on_cpu else {"gpu_memory_utilization": settings.gpu_share}),
    )


@contextmanager
def _own_threads(num_threads: int | None) -> Iterator[None]:
    """Set this thread's number of threads, and keep `torch.set_num_threads`, which vLLM replaces by a warning."""
    original = torch.set_num_threads
    if num_threads is not None:
        original(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads = original


def _load(worker: Any, weights: Weights | SharedWeights) -> None:  # noqa: ANN401
    """The way of a checkpoint into vLLM's fused and repacked layers; its warning of what did not come is an error."""
    # Of a head that is tied to the embedding it warns that nothing came; what is missing is looked for below.
    logging.getLogger(finalize_layerwise_reload.__module__).setLevel(logging.ERROR)
    model: nn.Module = worker.model_runner.get_model()
    wanted = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        arrays = weights.arrays() if isinstance(weights, SharedWeights) else weights
        named = ((name, as_tensor(array)) for name, array in _by_layer(arrays))
        loaded: set[str] = worker.model_runner.get_model().load_weights(named)
        finalize_layerwise_reload(model, worker.model_config)
        _repack_tied_head(model)
    if missing := wanted - set(loaded):
        raise RuntimeError(f"vLLM kept {len(missing)} old weights, such as {min(missing)}")


def _bit_sum(worker: Any) -> int | None:  # noqa: ANN401
    parameters = [parameter for _, parameter in worker.model_runner.get_model().named_parameters()]
    if any(parameter.element_size() not in (2, 4) for parameter in parameters):
        return None
    return bit_sum(parameters)


def _by_layer(weights: Weights) -> Iterable[tuple[str, Any]]:
    """Weights of a layer one after the other: vLLM holds what has come of a layer until it is whole."""
    return sorted(weights.items())


def _repack_tied_head(model: nn.Module) -> None:
    """On CPUs the head multiplies by a repacked copy of its weight, and the reload overlooks that of a tied head."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
