"""A model folder, hub id or GGUF file becomes a transformers model and its tokenizer.

Only safetensors weights are read and no code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import __version__ as tokenizers_version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from rexrag.errors import ModelError, first_line
from rexrag.model.fetching import resolve_model
from rexrag.model.stored_weights import refuse_lfs_pointers, stored_tensors
from rexrag.model.supported import MODEL_TYPES, refuse_quantized
from rexrag.model.weight_names import compare_names, compare_shapes

LOG = logging.getLogger(__name__)

ModelDtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]

# Loading takes seconds and is told otherwise: bars of transformers would cut through the progress line.
disable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(path: str | Path, *, dtype: ModelDtype) -> PreTrainedModel:
    """The causal language model, in evaluation mode.

    Raises:
        ModelError: no model there, no safetensors weights, quantised or incomplete ones, or an architecture that
            transformers does not have.
    """
    folder = resolve_model(str(path))
    check_weights(folder, load_config(folder))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # fault boundary: what a folder may hold is without bounds
        raise ModelError(_refusal(folder, "model", error)) from error
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    compare_names(missing=info["missing_keys"], unexpected=info["unexpected_keys"], where=folder)
    _check_tie(model, folder)
    _repair_generation(model, folder)
    model.train(False)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Raises:
        ModelError: no tokenizer there, or one that this version of tokenizers cannot read.
    """
    folder = resolve_model(str(path))
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"model folder {folder} has no tokenizer.json; copy the tokenizer's files into it")
    refuse_lfs_pointers(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # fault boundary: tokenizers raises bare exceptions
        raise ModelError(
            f"{_refusal(folder, 'tokenizer', error)}. A tokenizer.json of a newer version needs a newer package "
            f"tokenizers than {tokenizers_version}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of {folder} is {type(tokenizer).__name__}, a fast one (tokenizer.json) is needed"
        )
    return tokenizer


def load_config(path: str | Path) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: no model there, or a quantised one.
    """
    folder = resolve_model(str(path))
    refuse_lfs_pointers(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # fault boundary: each architecture checks its own settings
        raise ModelError(_refusal(folder, "model", error)) from error
    assert isinstance(config, PretrainedConfig)
    refuse_quantized(config, where=folder)
    return config


def check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Compare what the safetensors files say that they hold with the model's parameters; no weight is read.

    Raises:
        ModelError: a file is missing, cut off or damaged, or a weight is missing, quantised or of another shape.
    """
    stored = stored_tensors(folder)
    if config.model_type not in MODEL_TYPES:
        return  # transformers renames the weights of some architectures: the loaded model is asked
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # fault boundary: sizes that do not fit one another
        raise ModelError(_refusal(folder, "model", error)) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    # The body may be stored by itself, as transformers does with one that has no head.
    found = {name if name in wanted else f"{prefix}{name}": tensor for name, tensor in stored.items()}
    found = {name if name in wanted else name.removeprefix(prefix): tensor for name, tensor in found.items()}
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    missing = wanted.keys() - found.keys() - tied
    if missing:
        compare_names(missing=missing, unexpected=found.keys() - wanted.keys(), where=folder)
    compare_shapes({name: tensor.shape for name, tensor in found.items()}, wanted, where=folder)
    if bad := next((name for name in sorted(found.keys() & wanted.keys()) if not found[name].is_float), None):
        raise ModelError(
            f"{folder}: weight {bad} is stored as {found[bad].dtype}, a quantised type; name the model in bfloat16, "
            "float16 or float32 that it was made from"
        )


def end_ids(folder: Path, config: PretrainedConfig) -> frozenset[int]:
    """Tokens that end a generation by the model's own settings: generation_config.json, else config.json.

    Some models stop with either of two, of which the tokenizer names one.
    """
    try:
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        named = settings.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        named = None
    if named is None:
        named = getattr(config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in ids if type(i) is int and 0 <= i < int(config.get_text_config().vocab_size))


@cache
def fastest_dtype(device: Device = "cpu") -> Literal["float32", "bfloat16"]:
    """The precision in which a GPU or this processor multiplies faster; it does not change, so it is read once."""
    if device == "cuda":
        return "bfloat16"
    try:
        return dtype_of_processor(Path("/proc/cpuinfo").read_text())
    except OSError:
        return "float32"


def dtype_of_processor(cpuinfo: str) -> Literal["float32", "bfloat16"]:
    """The faster precision of the processor that Linux describes so.

    AMX and SVE make bfloat16 the faster, AVX512-BF16 only on AMD: without AMX an Intel core takes twice as long in it
    as in float32 (torch 2.13).
    """
    words = set(cpuinfo.split())
    is_faster = words & {"amx_bf16", "svebf16"} or words >= {"avx512_bf16", "AuthenticAMD"}
    return "bfloat16" if is_faster else "float32"


def _check_tie(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a head that is stored beside a tied embedding with other values: transformers then ties nothing."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        raise ModelError(
            f"{folder}: config.json ties the output head to the embedding (tie_word_embeddings), but the file holds "
            "another head; set tie_word_embeddings to false, or save the model anew"
        )


def _repair_generation(model: PreTrainedModel, folder: Path) -> None:
    """Drop generation settings with which transformers refuses to save the model: nothing here samples by them."""
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError as error:
        kept = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)  # type: ignore[no-untyped-call]
        LOG.warning(
            "%s: generation_config.json is invalid (%s); only its token ids are kept", folder,
            " ".join(str(error).split()),
        )  # fmt: skip


def _refusal(source: Path, what: str, error: Exception) -> str:
    return (
        f"no {what} could be loaded from {source}: {first_line(error)}; "
        "name a folder with config.json, safetensors and tokenizer.json"
    )
