"""A run's settings from their layers, each value with its source.

    default < the set that `method` names < recipe file < `--set`

A `--set method=...` also replaces the recipe's keys that belong to the set. Relative paths are relative to the
recipe file, those of `--set` to the working directory.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from rexrag.config import KEYS, TABLES, Config
from rexrag.data.foreign_keys import counterpart
from rexrag.data.formats import folder_advice
from rexrag.data.paths import matching_files
from rexrag.errors import ConfigError
from rexrag.files import read_user_text
from rexrag.methods import METHODS

_PATH_KEYS: Final = frozenset(
    {
        *("data.train", "data.dev", "data.eval", "model.path", "probe.hints", "env.prompt_file"),
        *("retriever.path", "retriever.encoder", "retriever.token_file"),
    }
)
_SET: Final = "--set"
_DEFAULT: Final = "default"
PREPARE: Final = "[prepare]"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Resolved settings. `sources` says for each dotted key where its value comes from."""

    name: str
    config: Config
    sources: Mapping[str, str]


class _Entries(dict[str, object]):
    """Some entries of a setting that is a table: the others stay as they are."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    source: str
    values: Mapping[str, object]
    base: Path


def quickstart_recipe() -> Path:
    """The recipe of `rexrag train` without one: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes" / "quickstart.toml"
    return inside if inside.exists() else package.parent / "recipes" / "quickstart.toml"


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Resolve a recipe file and the `--set` words over it.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of bounds, or settings at odds.
    """
    recipe = _Layer(source=path.name, values=_read_toml(path), base=path.resolve().parent)
    set_words = _Layer(source=_SET, values=_parse_overrides(overrides), base=Path.cwd())
    layers = _stack(recipe, set_words)
    values: dict[str, object] = {}
    sources, defaults = dict.fromkeys(KEYS, _DEFAULT), Config()
    for layer in layers:
        for key, value in layer.values.items():
            merged = _merged(values[key] if key in values else _lookup(defaults, key), value)
            values[key] = _resolve_paths(key, merged, base=layer.base)
            sources[key] = layer.source
    return Recipe(name=path.stem, config=make_config(values, sources=sources), sources=sources)


def _stack(recipe: _Layer, set_words: _Layer) -> list[_Layer]:
    method = set_words.values.get("method", recipe.values.get("method", Config().method))
    values = METHODS.get(method, {}) if isinstance(method, str) else {}
    method_set = _Layer(source=f"method {method}", values=values, base=recipe.base)
    over_recipe = [method_set] if "method" in set_words.values else []
    return [method_set, recipe, *over_recipe, set_words]


def make_config(values: Mapping[str, object], *, sources: Mapping[str, str]) -> Config:
    """Dotted keys and their values as a checked `Config`.

    Raises:
        ConfigError: one line for each problem, with key, value, source, bound, and what the key means.
    """
    tables: dict[str, object] = {}
    for key, value in values.items():
        table, _, name = key.rpartition(".")
        target = tables.setdefault(table, {}) if table else tables
        assert isinstance(target, dict)
        target[name] = value
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        lines = [_explain(dict(problem), sources=sources) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def flatten(config: Config) -> dict[str, object]:
    """All dotted keys with their values, in the order of a recipe."""
    return {key: _lookup(config, key) for key in KEYS}


def _lookup(config: Config, key: str) -> object:
    table, _, name = key.rpartition(".")
    value: object = getattr(getattr(config, table) if table else config, name)
    return value


def _read_toml(path: Path) -> dict[str, object]:
    try:
        tables = tomllib.loads(read_user_text(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"recipe {path}: cannot be read ({reason}); name an existing TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path}: is not valid TOML: {error}.") from None
    return dict(_known(tables, source=str(path)))


def _parse_overrides(words: Sequence[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for word in words:
        if word.encode("utf-8", "replace").decode("utf-8") != word:  # undecodable bytes come as lone surrogates
            raise ConfigError(f"--set {word!a}: is not UTF-8; write it in UTF-8, or set a UTF-8 locale.")
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {word}: must be KEY=VALUE, such as --set train.steps=20.")
        nested: object = _parse_value(text.strip())
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        for known, value in _known(nested, source=f"--set {word}"):
            if isinstance(value, dict) and len(key.strip()) > len(known):
                value = _Entries(value)
            values[known] = _merged(values.get(known), value)
    return values


def _merged(under: object, value: object) -> object:
    """A value over the one of the layer below."""
    if not isinstance(value, _Entries) or not isinstance(under, dict):
        return value
    return _Entries({**under, **value}) if isinstance(under, _Entries) else {**under, **value}


def _parse_value(text: str) -> object:
    """A TOML value, or the words themselves where they are none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value: object = parsed.get("value")
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list | dict) else text


def _known(tables: Mapping[str, object], *, source: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The dotted keys of nested tables, each of them known."""
    for name, value in tables.items():
        key = f"{prefix}{name}"
        if key in KEYS:
            yield key, value
        elif key in TABLES and isinstance(value, dict):
            yield from _known(value, source=source, prefix=f"{key}.")
        elif key in TABLES:
            raise ConfigError(f"{source}: `{key}` is a table; set its keys, such as {_keys_of(key)[0]}.")
        elif isinstance(value, dict) and value:
            yield from _known(value, source=source, prefix=f"{key}.")
        elif (told := counterpart(key)) is not None:
            raise ConfigError(f"{source}: unknown key `{key}`, of Search-R1 or verl: {told}.")
        else:
            raise ConfigError(f"{source}: unknown key `{key}`; the nearest known one is `{nearest_key(key)}`.")


def _keys_of(table: str) -> list[str]:
    return [key for key in KEYS if key.startswith(f"{table}.")]


def nearest_key(key: str) -> str:
    """The known key that an unknown one was probably meant to be: of the same name, the same initials, or alike."""
    name = key.rpartition(".")[2]
    names = {known: known.rpartition(".")[2] for known in KEYS}
    same_name = [known for known in KEYS if names[known] == name]
    same_initials = [known for known in KEYS if "".join(part[0] for part in names[known].split("_")) == name]
    return difflib.get_close_matches(key, same_name or same_initials or KEYS, n=1, cutoff=0.0)[0]


def _resolve_paths(key: str, value: object, *, base: Path) -> object:
    if key not in _PATH_KEYS:
        return value
    if isinstance(value, list):
        resolved = [_resolve_paths(key, item, base=base) for item in value]
        return [path for item in resolved for path in (item if isinstance(item, list) else [item])]
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConfigError(f'{key} = "{value}": names no path; name one, or leave the key out.')
    named = base / Path(value).expanduser()
    if key.startswith("data."):
        if has_magic(value):
            return [str(_located(file)) for file in matching_files(value, base=base)]
        return str(_located(named))
    path = named.resolve()
    if key == "model.path" and not value.startswith((".", "/", "~")) and not path.exists():
        return value  # a hub id
    return str(path)


def _located(file: Path) -> Path:
    """Where a data file is, by its own name: that of the file behind a link may say nothing of its source."""
    return file.parent.resolve() / file.name


def _explain(problem: Mapping[str, object], *, sources: Mapping[str, str]) -> str:
    """One problem that pydantic found, in the words of the user's recipe."""
    location = problem["loc"]
    message = str(problem["msg"])
    assert isinstance(location, tuple)
    if not location:
        return message.removeprefix("Value error, ")
    parts = [str(part) for part in location]
    key = next((k for k in (".".join(parts[:2]), parts[0]) if k in KEYS), ".".join(parts))
    bound = message.replace("Input should be", "must be").replace("String should", "must")
    meaning = "" if key not in KEYS else f" ({_describe(key)})"
    return f"{key} = {_show(problem['input'])} [{sources.get(key, '?')}]: {bound}{meaning}"


def _describe(key: str) -> str:
    table, _, name = key.rpartition(".")
    fields = type(getattr(Config(), table)).model_fields if table else Config.model_fields
    return fields[name].description or ""


def _show(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 80 else f"{text[:77]}..."


def resolved_toml(recipe: Recipe, *, base: Path | None = None) -> str:
    """The resolved settings as TOML, each value with its source; loading it again gives the same settings.

    Args:
        base: paths below it are written relative to it, so that a run folder can be moved.
    """
    lines = ["# Resolved settings; after each value where it comes from. A line without a value is not set."]
    table = ""
    for key, value in flatten(recipe.config).items():
        head, _, name = key.rpartition(".")
        if head != table:
            lines += ["", f"[{head}]"]
            table = head
        shown = _relative(value, base=base) if key in _PATH_KEYS and base else value
        assignment = f"# {name} =" if value is None else f"{name} = {_toml(shown)}"
        lines.append(f"{assignment}  # {recipe.sources[key]}")
    return "\n".join(lines) + "\n"


def _relative(value: object, *, base: Path) -> object:
    if isinstance(value, list):
        return [_relative(item, base=base) for item in value]
    path = Path(str(value))
    if not path.is_absolute() or not path.is_relative_to(base):
        return value
    return f"./{path.relative_to(base)}"


def _toml(value: object) -> str:
    """One value as TOML, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case dict():
            pairs = [f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()]
            return f"{{{', '.join(pairs)}}}"
        case _:
            # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def with_prepared(recipe: Recipe, *, prepared: Path) -> Recipe:
    """The settings with what `[prepare]` names filled in: the places under `prepared` where it is made.

    Raises:
        ConfigError: a key is set that `[prepare]` fills too.
    """
    wanted = prepared_values(recipe.config, prepared=prepared)
    current = flatten(recipe.config)
    for key, value in wanted.items():
        if current[key] not in (None, [], value):
            raise ConfigError(
                f"{key} = {_show(current[key])} [{recipe.sources[key]}]: [prepare] fills this key; "
                "leave one of the two out."
            )
    sources = {**recipe.sources, **dict.fromkeys(wanted, PREPARE)}
    config = make_config({**current, **wanted}, sources=sources)
    return Recipe(name=recipe.name, config=config, sources=sources)


def prepared_values(config: Config, *, prepared: Path) -> dict[str, object]:
    """The keys that `[prepare]` fills: dotted key -> where it is made."""
    prepare = config.prepare
    values: dict[str, object] = {}
    if prepare.model:
        values["model.path"] = str(prepared / ("warmstart" if prepare.warmstart else "model"))
    if prepare.world:
        files = {"data.train": "train.jsonl", "data.dev": "dev.jsonl", "data.eval": "test.jsonl"}
        values |= {key: [prepared / "world" / name] for key, name in files.items()}
    if prepare.index:
        values["retriever.path"] = prepared / "index"
    return values


def check_runnable(recipe: Recipe) -> None:
    """Refuse settings that cannot be trained with: something that a run needs is not named, or not there.

    Raises:
        ConfigError: one line for each problem.
    """
    filled = prepared_values(recipe.config, prepared=Path("prepared"))
    problems = [*_missing_keys(recipe.config, filled), *_missing_files(recipe, filled)]
    if problems:
        raise ConfigError("\n".join(problems))


def _missing_keys(config: Config, filled: Mapping[str, object]) -> list[str]:
    place = "retriever.url" if config.retriever.kind == "http" else "retriever.path"
    needed = ["model.path", "data.train", place, *(["data.dev"] if config.eval.every else [])]
    values = flatten(config)
    ways = {
        "model.path": "prepare.model",
        "data.train": "prepare.world",
        "data.dev": "prepare.world, or eval.every = 0",
        "retriever.path": "prepare.index",
    }
    return [
        f"{key}: is not set ({_describe(key)}); set it{f', or {ways[key]}' if key in ways else ''}."
        for key in needed
        if not values[key] and key not in filled
    ]


def _missing_files(recipe: Recipe, filled: Mapping[str, object]) -> list[str]:
    values = flatten(recipe.config)
    paths: list[tuple[str, Path]] = []
    for key in sorted(_PATH_KEYS - set(filled)):
        value = values[key]
        if key == "model.path" and not Path(str(value)).is_absolute():
            continue  # a hub id
        paths += [(key, Path(str(item))) for item in (value if isinstance(value, list) else [value]) if item]
    found = [(key, path, _fault_of(key, path)) for key, path in paths]
    return [f'{key} = "{path}" [{recipe.sources[key]}]: {fault}.' for key, path, fault in found if fault is not None]


def _fault_of(key: str, path: Path) -> str | None:
    if not path.exists():
        return "does not exist; name an existing one"
    return folder_advice(path) if key.startswith("data.") and path.is_dir() else None
