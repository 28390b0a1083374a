"""A model in shards: several processes hold a part of each weight, and gather a layer's when it computes (FSDP2).

What is called here on a sharded model, and each of its passes, is a collective: all processes make the same calls in
the same order. Of a model that is whole the same functions give what torch would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rexrag.errors import ModelError


def shard_model(model: PreTrainedModel, *, num_ranks: int, device: torch.device) -> PreTrainedModel:
    """Shard `model` in place over the processes of torch's default group; it is on `device` afterwards.

    Each layer is a unit that is gathered for itself; embedding, norm and head are one more, which stays gathered from
    a forward pass to the end of its backward pass, so that the head can be applied chunk by chunk. Gradients are sums
    over the processes.

    Raises:
        ModelError: a model that has no list of layers.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no list of layers to be shared out: take a dense Llama- or Qwen-like model, "
            "or learner.num_ranks = 1"
        )
    mesh = init_device_mesh(device.type, (num_ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.run_body = MethodType(_run_body, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_body")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _run_body(model: PreTrainedModel, **inputs: object) -> object:
    return model.base_model(**inputs)


def body_of(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass up to the last hidden states. Of a sharded model the head is gathered, too, until `release`."""
    body = model.run_body if isinstance(model, FSDPModule) else model.base_model
    return cast("Callable[..., Any]", body)


def release(model: PreTrainedModel) -> None:
    """After a pass without a backward pass: let go of what was gathered, and of gradients that it may have got."""
    if isinstance(model, FSDPModule):
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.grad = None
        model.reset_iter_state()  # and of what is noted of a pass until its backward pass


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors one after the other, in host memory; none where not `keep`. Those that are whole stay as they are.

    So a GPU holds one of them at a time.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            gathered[name] = tensor if full is tensor else full.detach().cpu()
    return gathered


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor, which every process has, on a parameter's device and in shards as the parameter is."""
    copy = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return copy
    return distribute_tensor(copy, parameter.device_mesh, parameter.placements, src_data_rank=None)
