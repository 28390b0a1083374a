"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): a model's weights stay, and beside each linear layer of
its blocks a product of two thin matrices is trained, y = W x + (α/r)·B (A x).

What leaves the learner is the sum, W + (α/r)·B A, under the names that the model's own weights have: engines and
readers of checkpoints know nothing of adapters. Checkpoints have them beside it, in PEFT's format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rexrag.errors import ModelError
from rexrag.model.sharding import shared_like, whole
from rexrag.model.stored_weights import WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

_NAME: Final = "default"
"""Of the adapter, as PEFT has it."""
_PART_OF_LAYER: Final = ".base_layer."
_ADAPTED: Final = f"{_PART_OF_LAYER}weight"
"""Ends of names: of what stands in a layer beside its adapter, and of the weight there."""
_WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
"""Before each name in PEFT's files."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Rank r, and α, which divided by r scales the product."""

    rank: int
    alpha: int


def add_adapters(model: PreTrainedModel, settings: AdapterSettings) -> None:
    """Put adapters into `model`, of whose parameters they alone are trained; it computes what it did.

    A is drawn from torch's generator, B is 0.

    Raises:
        ModelError: a model without linear layers in its blocks.
    """
    from peft import LoraConfig, inject_adapter_in_model  # a second, which runs without adapters need not wait

    layers = getattr(model.base_model, "layers", None)
    found = layers.named_modules() if isinstance(layers, nn.ModuleList) else ()
    targets = sorted({name.rpartition(".")[2] for name, module in found if type(module) is nn.Linear})
    if not targets:
        raise ModelError(
            f"{type(model).__name__} has no linear layers in a list of blocks for adapters to stand beside: take a "
            "dense Llama- or Qwen-like model, or learner.lora = 0"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets,
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model, adapter_name=_NAME)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters are trained in place of the weights."""
    return any(_layers(model))


def check_base(model: PreTrainedModel, checkpoint: Path) -> None:
    """Whether `model`, with the adapters of a checkpoint, is what that has.

    Compared are norms and biases, which no adapter changes, and the last weight that one does, as far as it was
    rounded. Of a model in shards that is a collective.

    Raises:
        ModelError: the adapters were trained beside another model.
    """
    names = own_names(model)
    adapted = [name for name, own in names.items() if is_adapted(own)]
    small = [name for name, own in names.items() if model.get_parameter(own).ndim < 2]
    with safe_open(checkpoint / WEIGHTS, framework="pt") as stored:
        for name in (*small, *adapted[-1:]):
            own, rounding = whole(full_weight(model, names[name])).float().cpu(), 0.0 if name in small else 2.0**-7
            if not torch.allclose(own, stored.get_tensor(name).float(), rtol=rounding, atol=rounding * 1e-3):
                raise ModelError(
                    f"{model.name_or_path} is not the model beside which the adapters of {checkpoint} were trained: "
                    f"{name} differs; put that model back, or start a new run with model.path = {checkpoint}"
                )


def narrow_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the weights of linear layers in `dtype` alone: autocast to it would multiply with no others."""
    embedding: nn.Module = model.get_input_embeddings()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        is_head = parameter is head.weight and parameter is not embedding.weight
        if is_adapted(name) or is_head:
            parameter.data = parameter.data.to(dtype)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what the wider ones took is for the engines that share the GPU


def own_names(model: PreTrainedModel) -> dict[str, str]:
    """Of each weight of the model: its name without adapters -> its name in `model`, a tied head once."""
    names = (name for name, _ in model.named_parameters())
    return {name.replace(_PART_OF_LAYER, "."): name for name in names if not _is_adapter(name)}


def is_adapted(name: str) -> bool:
    """Whether an adapter stands beside a parameter of this name in the model."""
    return name.endswith(_ADAPTED)


def full_weight(model: PreTrainedModel, name: str) -> Tensor:
    """A parameter by its name in `model`, with what the adapter beside it adds: float32 and whole then.

    Of a model in shards that is a collective.
    """
    parameter = model.get_parameter(name).detach()
    if not is_adapted(name):
        return parameter
    place = name.removesuffix(_ADAPTED)
    layer: LoraLayer = model.get_submodule(place)  # type: ignore[assignment]
    low, high = (whole(model.get_parameter(f"{place}.lora_{part}.{_NAME}.weight").detach()) for part in "AB")
    return torch.addmm(whole(parameter).float(), high, low, alpha=layer.scaling[_NAME])


def rounded(weight: Tensor, *, seed: int) -> Tensor:
    """A float32 weight rounded to bfloat16, up or down at random so that in the mean nothing is lost.

    What an adapter adds is at first less than half of a weight's last digit, and rounding to the nearest would drop
    it, in the engines alone: the learner adds it to the product. With numbers that have no further digits nothing is
    drawn: they stay as they are.
    """
    generator = torch.Generator(weight.device).manual_seed(seed)
    dropped = torch.randint(1 << 16, weight.shape, dtype=torch.int32, device=weight.device, generator=generator)
    bits = (weight.contiguous().view(torch.int32) + dropped) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """`model` computes what it did before it had any."""
    for layer in _layers(model):
        layer.set_scale(_NAME, 0.0)
    try:
        yield
    finally:
        for layer in _layers(model):
            layer.set_scale(_NAME, 1.0)


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters as PEFT's files name them, in shards as they are; empty where the model has none."""
    return {
        _PREFIX + name.replace(f".{_NAME}.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if _is_adapter(name)
    }


def set_adapters(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `adapter_tensors`, from whole tensors.

    Raises:
        ValueError: these are not the tensors of this model's adapters.
    """
    own = adapter_tensors(model)
    if different := own.keys() ^ tensors.keys():
        raise ValueError(f"{min(different)} is not in both the adapters of the model and those that are read")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"adapter {name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(shared_like(tensors[name], tensor))


def save_adapters(folder: Path, *, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as a folder that `peft.PeftModel.from_pretrained` reads beside the model that they are of."""
    folder.mkdir()
    config: LoraConfig = model.peft_config[_NAME]  # type: ignore[assignment]
    config.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS)


def load_adapters(folder: Path) -> dict[str, Tensor]:
    """What `save_adapters` wrote; empty where the folder does not exist."""
    return load_file(folder / _WEIGHTS) if folder.exists() else {}


def _layers(model: PreTrainedModel) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if hasattr(module, "lora_A"))  # type: ignore[misc]


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
