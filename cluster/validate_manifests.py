"""Check manifests strictly: unknown fields, wrong types, missing fields, kinds that nothing is known of.

    cluster/validate FILE... [--crds DIR]

Exit status: 0 where all is well, 2 where something is not; each problem names file, line, object, path and what to do.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from cluster.crd_schema import GROUP, Schema, closed_object, derive, object_metadata, read_crds
from cluster.derive_schema import SHIPPED
from rexrag.errors import UserError, counted

_QUANTITY_MARK: Final = "[KMGTPE]i"
_TYPES: Final = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a table",
    "array": "a list",
    "null": "empty",
}
_TEXT: Final[Schema] = {"type": "string"}
_TEXTS: Final[Schema] = {"type": "array", "items": _TEXT}

KUSTOMIZATION: Final = closed_object(
    {
        "apiVersion": {"type": "string"},
        "kind": _TEXT,
        "metadata": object_metadata(),
        "namespace": _TEXT,
        "namePrefix": _TEXT,
        "resources": _TEXTS,
        "images": {
            "type": "array",
            "items": closed_object(
                {"name": _TEXT, "newName": _TEXT, "newTag": _TEXT, "digest": _TEXT}, required=("name",)
            ),
        },
        "patches": {
            "type": "array",
            "items": closed_object(
                {
                    "path": _TEXT,
                    "patch": _TEXT,
                    "target": closed_object(
                        {"group": _TEXT, "version": _TEXT, "kind": _TEXT, "name": _TEXT, "namespace": _TEXT}
                    ),
                }
            ),
        },
    },
    required=("apiVersion", "kind"),
)
"""The fields of a kustomization that overlays of these manifests need."""


class ManifestError(UserError):
    """A file that holds no manifests."""


@dataclass(frozen=True, kw_only=True)
class Checker:
    """What objects are checked against: a validator for each kind, as `<apiVersion>/<kind>`."""

    source: str
    validators: Mapping[str, Draft202012Validator]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One object of a file: its values, and the YAML nodes that know their lines."""

    value: object
    node: yaml.Node


def load_checker(crds: Path | None = None) -> Checker:
    """The shipped schema; with a folder of CRDs, Ray's kinds as those define them.

    Raises:
        SchemaError: the folder's CRDs cannot be used.
    """
    schema: Schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    validators = _validators(schema)
    source = str(schema["$comment"])
    if crds is not None:
        source = f"the CRDs of {crds}"
        theirs = _validators(derive(read_crds(crds), source=source))
        validators = {key: one for key, one in validators.items() if not key.startswith(f"{GROUP}/")} | theirs
    validators["kustomize.config.k8s.io/v1beta1/Kustomization"] = Draft202012Validator(KUSTOMIZATION)
    return Checker(source=source, validators=validators)


def _validators(schema: Schema) -> dict[str, Draft202012Validator]:
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    return {
        key: Draft202012Validator({"$ref": f"#/$defs/{key.replace('/', '~1')}", "$defs": definitions})
        for key in definitions
        if "/" in key  # the others are shared parts
    }


def check_file(path: Path, checker: Checker) -> list[str]:
    """The problems of a file by line. None: all its objects are known and valid.

    Raises:
        ManifestError: the file cannot be read, is no YAML, or has no object.
    """
    found = {problem for document in _documents(path) for problem in _problems(document, checker)}
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def _documents(path: Path) -> list[Document]:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        found = []
        while loader.check_node():
            node = loader.get_node()
            found.append(Document(value=loader.construct_document(node), node=node))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ManifestError(f"{path}: cannot be read as YAML: {error}") from None
    objects = [document for document in found if document.value is not None]
    if not objects:
        raise ManifestError(f"{path}: holds no object; name files with Kubernetes manifests.")
    return objects


def _problems(document: Document, checker: Checker) -> Iterator[tuple[int, str]]:
    value = document.value
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        yield _line(document.node, ()), "is no Kubernetes object: `apiVersion` and `kind` are missing"
        return
    kind, metadata = value["kind"], value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    title = f"{kind} {name}" if name else kind
    for line, path in _repeated(document.node, ""):
        yield line, f"{title}: {path}: is given twice in one table; YAML readers keep one of them"
    validator = checker.validators.get(f"{value.get('apiVersion')}/{kind}")
    if validator is None:
        known = ", ".join(sorted(checker.validators))
        yield _line(document.node, ()), f"{title}: apiVersion {value.get('apiVersion')} has no schema; known: {known}"
        return
    for error in validator.iter_errors(value):
        for place, text in _explain(error):
            yield _line(document.node, place), f"{title}: {_dotted(place)}: {text}"


def _explain(error: ValidationError) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong, and where, in the words of the file."""
    path, value = tuple(error.absolute_path), error.instance
    rule, limit = str(error.validator), error.validator_value
    if rule == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        for name in value:
            if name not in known:
                near = (
                    f"; the nearest known one is `{_nearest(str(name), known)}`" if known else "; none are known here"
                )
                yield (*path, name), f"unknown field{near}"
    elif rule == "required":
        for name in limit:
            if name not in value:
                yield (*path, name), "is missing"
    elif rule == "type":
        wanted = [_TYPES[name] for name in ([limit] if isinstance(limit, str) else limit)]
        quoted = isinstance(value, bool | int | float) and "string" in limit and wanted == ["text"]
        advice = f'; put it in quotes: "{_shown(value)}"' if quoted else ""
        yield path, f"= {_shown(value)}: must be {' or '.join(wanted)}{advice}"
    elif rule == "pattern" and _QUANTITY_MARK in str(limit):
        yield path, f"= {_shown(value)}: must be a quantity, such as 2, 500m or 16Gi"
    elif rule == "enum":
        yield path, f"= {_shown(value)}: must be one of {', '.join(map(str, limit))}"
    else:
        yield path, f"= {_shown(value)}: {rule} is {limit}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    text = text if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(name: str, known: Sequence[str]) -> str:
    folded = {one.lower(): one for one in known}
    return folded[difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.0)[0]]


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "(the object)"


def _line(node: yaml.Node, path: Sequence[str | int]) -> int:
    """The line of what a path leads to, or of the last part of it that is there."""
    line = node.start_mark.line
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, child) for key, child in node.value if key.value == str(part)]
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return int(line) + 1


def _repeated(node: yaml.Node, path: str) -> Iterator[tuple[int, str]]:
    """Keys that a table has twice: YAML readers keep one of them and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            place = f"{path}.{key.value}" if path else str(key.value)
            if key.value in seen:
                yield key.start_mark.line + 1, place
            seen.add(key.value)
            yield from _repeated(child, place)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _repeated(child, f"{path}[{index}]")


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="cluster/validate", description="Check KubeRay manifests strictly.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="manifest, in YAML or JSON")
    parser.add_argument("--crds", type=Path, metavar="DIR", help="folder with the CRDs of your own KubeRay")
    options = parser.parse_args(words)
    problems: list[str] = []
    try:
        checker = load_checker(options.crds)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    for file in options.files:
        try:
            problems += check_file(file, checker)
        except ManifestError as error:
            problems.append(str(error))
    files = counted(len(options.files), "file")
    if problems:
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
        sys.stderr.write(f"{counted(len(problems), 'problem')} in {files}.\n")
        return 2
    sys.stdout.write(f"{files}: valid against {checker.source}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
