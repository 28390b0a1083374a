"""What the engine asks of vLLM's own classes, on CPUs or GPUs: an upgrade that moves it fails here, with its name.

Nothing is started: it runs over the build for CUDA on a machine without a GPU, too.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from rexrag.engine.vllm_environment import installed_for, prepare

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(installed_for() is None, reason="needs vLLM: `make test-vllm` runs it in .venv-vllm"),
]


def named(path: str) -> Any:  # noqa: ANN401
    """What "module:attribute.attribute" is."""
    module, _, names = path.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    prepare(installed_for() or "cpu")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (
            "vllm.engine.arg_utils:EngineArgs",
            "model skip_tokenizer_init generation_config dtype seed max_model_len max_num_seqs max_num_batched_tokens "
            "enable_prefix_caching enable_chunked_prefill async_scheduling logprobs_mode enforce_eager block_size "
            "tensor_parallel_size distributed_executor_backend kv_cache_memory_bytes gpu_memory_utilization",
        ),
        (
            "vllm.v1.engine:EngineCoreRequest",
            "request_id prompt_token_ids mm_features sampling_params pooling_params arrival_time lora_request "
            "cache_salt data_parallel_rank",
        ),
        (
            "vllm.v1.engine:EngineCoreOutput",
            "request_id new_token_ids new_logprobs new_prompt_logprobs_tensors finish_reason events prefill_stats",
        ),
        (
            "vllm.sampling_params:SamplingParams",
            "temperature seed max_tokens stop_token_ids ignore_eos logprobs prompt_logprobs skip_reading_prefix_cache "
            "detokenize",
        ),
    ],
)
def test_fields(path: str, fields: str) -> None:
    there = named(path)
    names = (
        {field.name for field in dataclasses.fields(there)}
        if dataclasses.is_dataclass(there)
        else set(there.__struct_fields__)
    )
    assert set(fields.split()) <= names


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("vllm.v1.engine.core_client:InprocClient.abort_requests", ("request_ids",)),
        ("vllm.v1.engine.core_client:InprocClient.add_request", ("request",)),
        ("vllm.v1.engine.core_client:InprocClient.collective_rpc", ("method", "timeout")),
        ("vllm.v1.engine.core_client:InprocClient.get_output", ()),
        ("vllm.v1.engine.core_client:InprocClient.reset_prefix_cache", ("reset_running_requests",)),
        ("vllm.v1.engine.core_client:InprocClient.shutdown", ()),
        ("vllm.v1.executor:Executor.get_class", ("vllm_config",)),
        ("vllm.v1.core.sched.scheduler:Scheduler.get_num_unfinished_requests", ()),
        ("vllm.v1.worker.gpu_worker:Worker.check_health", ()),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.get_model", ()),
        ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_model", ()),
        ("vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs", ("logits_fn",)),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states", ("scheduler_output",)),
        ("vllm.model_executor.model_loader.reload:initialize_layerwise_reload", ("model",)),
        ("vllm.model_executor.model_loader.reload:finalize_layerwise_reload", ()),
        ("vllm.config:set_current_vllm_config", ("vllm_config",)),
    ],
)
def test_methods_take_what_they_are_given(path: str, arguments: tuple[str, ...]) -> None:
    function: Callable[..., Any] = named(path)
    assert set(arguments) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("architecture", ["llama:LlamaForCausalLM", "qwen2:Qwen2ForCausalLM", "qwen3:Qwen3ForCausalLM"])
def test_models_take_weights_by_the_names_of_transformers_and_say_which_they_took(architecture: str) -> None:
    load = named(f"vllm.model_executor.models.{architecture}.load_weights")
    signature = inspect.signature(load)
    assert list(signature.parameters)[1:] == ["weights"]
    assert "set" in str(signature.return_annotation)
