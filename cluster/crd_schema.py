"""What KubeRay's CRDs allow, as one compact JSON schema: names of fields, types, and nothing else allowed.

The API server drops fields that a CRD does not know, so that a typing error changes nothing and nobody is told. Here
an object is closed wherever its CRD lists properties; maps stay open. Descriptions, defaults and rules in CEL are left
out, and what occurs more than once is kept once under `$defs`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import yaml

from rexrag.errors import UserError, counted

Schema = dict[str, object]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
GROUP: Final = "ray.io"
_KEPT: Final = ("enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
_NAMES_OF_CRDS: Final = ("*.yaml", "*.yml", "*.yaml.gz", "*.yml.gz")
_MIN_SHARED_CHARS: Final = 60
"""A sub-schema shorter than this is repeated: the reference to it would save nothing."""


class SchemaError(UserError):
    """CRDs that cannot be used: missing, unreadable, or not KubeRay's."""


def read_crds(folder: Path) -> list[Schema]:
    """All CRDs of KubeRay's group in a folder's YAML files, which may be gzipped.

    Raises:
        SchemaError: no such folder, none of them there, or a file that is no YAML; it names the path.
    """
    files = sorted(path for pattern in _NAMES_OF_CRDS for path in folder.glob(pattern))
    found = [crd for file in files for crd in _crds_of(file)]
    if not found:
        raise SchemaError(
            f"CRDs = {folder}: no CustomResourceDefinition of {GROUP} in {counted(len(files), 'YAML file')} there; "
            "name the folder of KubeRay's rayclusters.yaml, such as ray-operator/config/crd/bases of its sources."
        )
    return found


def _crds_of(file: Path) -> Iterator[Schema]:
    try:
        data = file.read_bytes()
        text = gzip.decompress(data) if file.suffix == ".gz" else data
        documents = list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, EOFError, yaml.YAMLError) as error:
        raise SchemaError(f"CRDs = {file}: cannot be read ({error}); name a folder of whole YAML files.") from None
    for document in documents:
        if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
            spec = document.get("spec")
            if isinstance(spec, dict) and spec.get("group") == GROUP:
                yield document


def derive(crds: list[Schema], *, source: str) -> Schema:
    """The compact schema of all kinds that the CRDs define, and of the core kinds whose parts they carry.

    Args:
        crds: whole documents. source: what they are, such as a version, kept in the schema.

    Returns:
        A JSON schema whose `$defs` hold one entry for each kind, `<apiVersion>/<kind>`, beside the shared parts.

    Raises:
        SchemaError: no CRD has a version to derive from, or one lacks what every CRD has.
    """
    kinds: dict[str, Schema] = {}
    for crd in crds:
        try:
            kinds |= {key: _closed(schema) for key, schema in _kinds_of(crd)}
        except (KeyError, TypeError, AttributeError) as error:
            raise SchemaError(
                f"CRDs = {source}: one of {GROUP} is not whole ({type(error).__name__}: {error}); "
                "name those of a KubeRay release."
            ) from None
    if not kinds:
        raise SchemaError(f"CRDs = {source}: no version with a schema is served; name those of a KubeRay release.")
    for schema in kinds.values():
        _add_metadata(schema)
    kinds |= _core_kinds(kinds.get(f"{GROUP}/v1/RayCluster"))
    return {"$schema": DIALECT, "$comment": source, "$defs": _share(kinds)}


def _kinds_of(crd: Schema) -> Iterator[tuple[str, Schema]]:
    """Served versions that are not deprecated, with their schemas."""
    spec = crd["spec"]
    assert isinstance(spec, dict)
    for version in spec["versions"]:
        if version.get("served") and not version.get("deprecated"):
            name = f"{spec['group']}/{version['name']}/{spec['names']['kind']}"
            yield name, version["schema"]["openAPIV3Schema"]


def _closed(node: Mapping[str, object]) -> Schema:
    """One node of a CRD's schema in compact form."""
    closed: Schema = {}
    if node.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    elif "type" in node:
        closed["type"] = [node["type"], "null"] if node.get("nullable") else node["type"]
    closed |= {key: node[key] for key in _KEPT if key in node}
    items, values = node.get("items"), node.get("additionalProperties")
    if isinstance(items, dict):
        closed["items"] = _closed(items)
    if isinstance(values, dict):
        closed["additionalProperties"] = _closed(values)
    elif node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields") and values is not True:
        closed["additionalProperties"] = False
    properties = node.get("properties")
    if isinstance(properties, dict):
        closed["properties"] = {name: _closed(child) for name, child in properties.items()}
        required = node.get("required")
        # The API server fills defaults in before it asks for what is required.
        needed = [name for name in required if "default" not in properties[name]] if isinstance(required, list) else []
        if needed:
            closed["required"] = needed
    return closed


def _add_metadata(schema: Schema) -> None:
    """CRDs leave an object's metadata to the API server, and its status is not for users to write."""
    properties = _properties(schema)
    properties["metadata"] = object_metadata()
    properties.pop("status", None)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]


def object_metadata() -> Schema:
    """What a manifest may say of an object itself."""
    texts: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
    return closed_object(
        {
            "name": {"type": "string"},
            "generateName": {"type": "string"},
            "namespace": {"type": "string"},
            "labels": texts,
            "annotations": texts,
            "finalizers": {"type": "array", "items": {"type": "string"}},
        }
    )


def closed_object(properties: Mapping[str, object], *, required: tuple[str, ...] = ()) -> Schema:
    """An object that has these properties and no others."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": dict(properties)}
    return schema | ({"required": list(required)} if required else {})


def _core_kinds(cluster: Schema | None) -> dict[str, Schema]:
    """Kinds of Kubernetes itself whose specifications a RayCluster embeds; none where its CRD lacks them."""
    if cluster is None:
        return {}
    template = _at(cluster, "spec", "headGroupSpec", "template")
    service = _at(cluster, "spec", "headGroupSpec", "headService", "spec")
    rules = _at(cluster, "spec", "networkPolicy", "head")
    ingress, egress = _at(rules, "ingressRules"), _at(rules, "egressRules")
    selector = _at(ingress, [], "from", [], "podSelector")
    volumes = _at(template, "spec", "volumes", [])
    claim = _at(volumes, "ephemeral", "volumeClaimTemplate", "spec")
    if not (template and service and ingress and egress and selector and claim):
        return {}
    texts: Schema = {"type": "array", "items": {"type": "string"}}
    count: Schema = {"type": "integer", "minimum": 0}
    policy = closed_object(
        {"podSelector": selector, "policyTypes": texts, "ingress": ingress, "egress": egress}, required=("podSelector",)
    )
    bound: Schema = {"type": ["integer", "string"]}
    strategy = closed_object(
        {
            "type": {"type": "string", "enum": ["Recreate", "RollingUpdate"]},
            "rollingUpdate": closed_object({"maxSurge": bound, "maxUnavailable": bound}),
        }
    )
    deployment = closed_object(
        {
            "replicas": count,
            "selector": selector,
            "strategy": strategy,
            "template": template,
            "minReadySeconds": count,
            "progressDeadlineSeconds": count,
            "revisionHistoryLimit": count,
            "paused": {"type": "boolean"},
        },
        required=("selector", "template"),
    )
    specs = {
        "v1/Service": service,
        "v1/PersistentVolumeClaim": claim,
        "networking.k8s.io/v1/NetworkPolicy": policy,
        "apps/v1/Deployment": deployment,
    }
    return {key: _whole_object(spec) for key, spec in specs.items()}


def _whole_object(spec: Schema) -> Schema:
    text: Schema = {"type": "string"}
    return closed_object(
        {"apiVersion": text, "kind": text, "metadata": object_metadata(), "spec": spec},
        required=("apiVersion", "kind", "metadata", "spec"),
    )


def _at(schema: Schema, *path: str | list[object]) -> Schema:
    """The sub-schema there, `[]` for a list's entries; empty where there is none."""
    for part in path:
        child = _properties(schema).get(part) if isinstance(part, str) else schema.get("items")
        if not isinstance(child, dict):
            return {}
        schema = child
    return schema


def _properties(schema: Schema) -> dict[str, object]:
    properties = schema.get("properties", {})
    assert isinstance(properties, dict)
    return properties


def _share(kinds: Mapping[str, Schema]) -> Schema:
    """The kinds with every sub-schema that occurs more than once moved beside them, named after a field that has it."""
    counts: Counter[str] = Counter()
    for schema in kinds.values():
        for _, child in _children(schema):
            _count(child, counts)
    shared = {text for text, count in counts.items() if count > 1 and len(text) >= _MIN_SHARED_CHARS}
    names: dict[str, str] = {}
    definitions: Schema = {}
    for key in sorted(kinds):
        definitions[key] = _referring(kinds[key], shared=shared, names=names, definitions=definitions)
    return dict(sorted(definitions.items()))


def _count(schema: Schema, counts: Counter[str]) -> None:
    text = _text(schema)
    counts[text] += 1
    if counts[text] == 1:  # what is inside a repeated sub-schema is repeated by it, not by itself
        for _, child in _children(schema):
            _count(child, counts)


def _children(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, child in _properties(schema).items():
        assert isinstance(child, dict)
        yield name, child
    for key in ("items", "additionalProperties"):
        child = schema.get(key)
        if isinstance(child, dict):
            yield key, child


def _referring(schema: Schema, *, shared: set[str], names: dict[str, str], definitions: Schema) -> Schema:
    """The schema with its children replaced by references where they are shared."""

    def refer(name: str, child: Schema) -> Schema:
        text = _text(child)
        if text not in shared:
            return _referring(child, shared=shared, names=names, definitions=definitions)
        if text not in names:
            names[text] = _free_name(name, definitions)
            definitions[names[text]] = {}  # keeps the name while the parts inside get theirs
            definitions[names[text]] = _referring(child, shared=shared, names=names, definitions=definitions)
        return {"$ref": f"#/$defs/{names[text]}"}

    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {
            name: refer(name, child) for name, child in _children({"properties": schema["properties"]})
        }
    for key in ("items", "additionalProperties"):
        child = schema.get(key)
        if isinstance(child, dict):
            result[key] = refer(key, child)
    return result


def _free_name(name: str, definitions: Schema) -> str:
    number = 1
    while (candidate := name if number == 1 else f"{name}-{number}") in definitions:
        number += 1
    return candidate


def _text(schema: Schema) -> str:
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))
