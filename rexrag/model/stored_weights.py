"""The safetensors files of a model folder, read by their headers alone: what is in them, and whether they are whole.

A header is 8 bytes with its length, then JSON: name -> dtype, shape, first and last byte of the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rexrag.errors import ModelError, counted

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
ADAPTER: Final = "adapter_config.json"
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_LFS_MARK: Final = b"version https://git-lfs"
_MAX_HEADER_BYTES: Final = 100_000_000
"""As safetensors itself has it."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it is a plain floating-point tensor, no quantised one."""
        return self.dtype in _FLOATS


def refuse_lfs_pointers(folder: Path) -> None:
    """Refuse a clone that Git LFS has not filled.

    Raises:
        ModelError: a file of the folder is a pointer to its content.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            with file.open("rb") as opened:
                if opened.read(len(_LFS_MARK)) == _LFS_MARK:
                    raise ModelError(
                        f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}, "
                        "or fetch the model anew"
                    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name.

    Raises:
        ModelError: no safetensors weights, or a file that is missing, cut off or damaged.
    """
    return {name: tensor for file in _weight_files(folder) for name, tensor in _header(file)}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / ADAPTER).exists():  # transformers would put it over the weights, or fetch those that it names
        raise ModelError(
            f"{folder} has an adapter ({ADAPTER}): merge it into its model (PEFT's merge_and_unload), or remove that "
            "file if the weights are meant without it"
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"no model could be loaded from {folder}: it has no {WEIGHTS}; name a folder with config.json, "
            "safetensors and tokenizer.json"
        )
    try:
        parts = sorted(
            {str(part) for part in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is damaged ({error!r}); fetch the model anew") from error
    if absent := [part for part in parts if not (folder / part).is_file()]:
        raise ModelError(
            f"{folder} lacks {len(absent)} of {counted(len(parts), 'file')} of its weights, such as {absent[0]}; "
            "fetch the model anew"
        )
    return [folder / part for part in parts]


def _header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(
                f"{file} is cut off or no safetensors file ({counted(size, 'byte')}); fetch the model anew"
            )
        text = opened.read(length)
    try:
        entries: Mapping[str, Mapping[str, Any]] = json.loads(text)
        entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = [
            (name, StoredTensor(file=file, dtype=str(entry["dtype"]), shape=tuple(map(int, entry["shape"]))))
            for name, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{file} has a damaged header ({error!r}); fetch the model anew") from error
    if size != end:
        what = "is cut off" if size < end else "is damaged"
        raise ModelError(f"{file} {what}: it has {counted(size, 'byte')}, its header says {end}; fetch the model anew")
    yield from tensors
