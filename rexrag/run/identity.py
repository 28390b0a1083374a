"""What makes a run the run that it is, beside its settings: the content of files that they name, and where it began.

It is written into `identity.json` of the run folder when that is made; a resume with something else is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

from rexrag.config import Config
from rexrag.errors import ConfigError
from rexrag.files import sha256_file, write_atomic
from rexrag.retrieval.manifest import MANIFEST_NAME
from rexrag.run_folder import RunFolder

MOVABLE: Final = ("data.train", "data.dev", "data.eval", "probe.hints", "env.prompt_file", "retriever.path")
"""Keys that mean what is in the files that they name, wherever these are."""


def write_identity(run: RunFolder, *, config: Config, checkpoint: Path | None, step: int) -> None:
    """Note the files that the settings name, and the checkpoint of another run that this one goes on from."""
    origin = None if checkpoint is None else {"checkpoint": str(checkpoint), "step": step}
    hashes = {key: _hash(path) for key, path in named_files(config).items()}
    content = {"files": hashes, "origin": origin, "contents": {key: _contents(config, key) for key in MOVABLE}}
    write_atomic(run.identity, json.dumps(content, indent=1) + "\n")


def only_moved(run: RunFolder, config: Config, key: str) -> bool:
    """Whether the settings name under a key what the run was begun with, at another place.

    A job's files are unpacked into another folder each time.
    """
    noted = _read(run).get("contents")
    if key not in MOVABLE or not isinstance(noted, dict):
        return False
    contents = _contents(config, key)
    return bool(contents) and None not in contents and noted.get(key) == contents


def check_identity(run: RunFolder, config: Config) -> None:
    """Refuse to go on with other contents under the same names; a run of an earlier version noted none.

    Raises:
        ConfigError: one line for each file.
    """
    noted = _read(run).get("files")
    if not isinstance(noted, dict):
        return
    changed = [
        f"{key} = {path}: its content is not what the run was begun with"
        for key, path in named_files(config).items()
        if key in noted and noted[key] != _hash(path)
    ]
    if changed:
        raise ConfigError("\n".join(changed) + "\nPut the old content back, or start a new run.")


def origin_of(run: RunFolder) -> tuple[Path | None, int]:
    """The checkpoint of another run that this one began from, and its step; (None, 0) where it began at step 0.

    Raises:
        ConfigError: the checkpoint is not there any more.
    """
    origin = _read(run).get("origin")
    if not isinstance(origin, dict):
        return None, 0
    checkpoint = Path(origin["checkpoint"])
    if not (checkpoint / "COMMIT").is_file():
        raise ConfigError(
            f"run {run.root}: has no checkpoint of its own yet, and the one that it began from, {checkpoint}, is gone; "
            "put it back, or start a new run."
        )
    return checkpoint, int(origin["step"])


def first_step_of(run: RunFolder) -> int:
    """The step that the run began after: that of another run's checkpoint, or 0."""
    origin = _read(run).get("origin")
    return int(origin["step"]) if isinstance(origin, dict) else 0


def note_precision(run: RunFolder, precision: Mapping[str, str]) -> list[str]:
    """Note what `auto` has come to on this hardware; returns a sentence for each part where it was another before."""
    content = _read(run)
    before = content.get("precision")
    write_atomic(run.identity, json.dumps({**content, "precision": dict(precision)}, indent=1) + "\n")
    known = before if isinstance(before, dict) else {}
    return [
        f"{key} is {value} on this hardware, and was {known[key]} where the run was before"
        for key, value in precision.items()
        if known.get(key, value) != value
    ]


def named_files(config: Config) -> dict[str, Path]:
    """Files whose content the settings mean, by key: hints, prompt, and the module of one's own reward."""
    files = {"probe.hints": config.probe.hints, "env.prompt_file": config.env.prompt_file}
    module, colon, _ = config.reward.kind.partition(":")
    if colon:
        files["reward.kind"] = _module_file(module)
    return {key: path for key, path in files.items() if path is not None}


def _contents(config: Config, key: str) -> list[str | None]:
    """Hashes of the files that a key names, of an index that of its manifest, which has those of all others."""
    table, _, name = key.partition(".")
    named = getattr(getattr(config, table), name)
    paths = named if isinstance(named, list) else [named] if named is not None else []
    return [_hash(path / MANIFEST_NAME if path.is_dir() else path) for path in map(Path, paths)]


def _module_file(module: str) -> Path | None:
    """Where a module's source is, without running it or its packages; None where that cannot be told."""
    places = [*sys.path, str(Path.cwd())]  # where `load_reward` looks
    spec = None
    for name in _prefixes(module):
        spec = PathFinder.find_spec(name, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _hash(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None


def _read(run: RunFolder) -> dict[str, object]:
    try:
        content: object = json.loads(run.identity.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
