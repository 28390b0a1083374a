"""What the compact schema keeps of a CRD: closed objects, open maps, types, and each part once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cluster.crd_schema import Schema, SchemaError, derive, read_crds
from cluster.derive_schema import SHIPPED, main, schema_text

TEXT: Schema = {"type": "string"}
MAX_SHIPPED_BYTES = 200_000


def crd(spec: Schema, *, kind: str = "RayThing", deprecated: bool = False) -> Schema:
    """A CRD of one kind whose `spec` is this."""
    whole: Schema = {
        "type": "object",
        "properties": {
            "apiVersion": TEXT,
            "kind": TEXT,
            "metadata": {"type": "object"},
            "spec": spec,
            "status": {"type": "object", "properties": {"state": TEXT}},
        },
    }
    version = {"name": "v1", "served": True, "deprecated": deprecated, "schema": {"openAPIV3Schema": whole}}
    return {
        "kind": "CustomResourceDefinition",
        "spec": {"group": "ray.io", "names": {"kind": kind}, "versions": [version]},
    }


def accepts(spec: Schema, value: object) -> bool:
    """Does the schema that is derived from a CRD with this `spec` accept this value there?"""
    schema = derive([crd(spec)], source="a test")
    validator = Draft202012Validator({"$ref": "#/$defs/ray.io~1v1~1RayThing", "$defs": schema["$defs"]})
    whole = {"apiVersion": "ray.io/v1", "kind": "RayThing", "metadata": {"name": "one"}, "spec": value}
    return bool(validator.is_valid(whole))


def test_objects_are_closed_and_maps_stay_open() -> None:
    spec: Schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "What it is called."},
            "labels": {"type": "object", "additionalProperties": TEXT},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    assert accepts(spec, {"name": "a", "labels": {"any": "text"}, "free": {"any": 1}})
    assert not accepts(spec, {"nam": "a"})
    assert not accepts(spec, {"labels": {"any": 1}})
    assert "What it is called" not in json.dumps(derive([crd(spec)], source="a test"))


def test_a_number_or_text_is_either_and_nothing_else() -> None:
    either: Schema = {"anyOf": [{"type": "integer"}, TEXT], "x-kubernetes-int-or-string": True, "pattern": "^[0-9]+m?$"}
    spec: Schema = {"type": "object", "properties": {"cpu": either}}
    assert accepts(spec, {"cpu": 2})
    assert accepts(spec, {"cpu": "500m"})
    assert not accepts(spec, {"cpu": "much"})
    assert not accepts(spec, {"cpu": 0.5})
    assert not accepts(spec, {"cpu": True})


def test_what_has_a_default_may_be_missing() -> None:
    spec: Schema = {
        "type": "object",
        "properties": {"port": {"type": "integer"}, "protocol": {"type": "string", "default": "TCP"}},
        "required": ["port", "protocol"],
    }
    assert accepts(spec, {"port": 1})
    assert not accepts(spec, {"protocol": "TCP"})


def test_a_status_is_not_for_users_and_nothing_may_be_null_unasked() -> None:
    schema = derive([crd({"type": "object", "properties": {"at": TEXT | {"nullable": True}, "by": TEXT}})], source="t")
    definitions = schema["$defs"]
    assert isinstance(definitions, dict)
    assert "status" not in definitions["ray.io/v1/RayThing"]["properties"]
    spec: Schema = {"type": "object", "properties": {"at": TEXT | {"nullable": True}, "by": TEXT}}
    assert accepts(spec, {"at": None})
    assert not accepts(spec, {"by": None})


LONG = "long enough to be left out, and to be seen if it is not"


def table(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties}


def rows(entry: Schema) -> Schema:
    return {"type": "array", "items": entry}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def leaf(kind: str) -> Schema:
    return {"type": kind, "description": LONG}


def nodes() -> st.SearchStrategy[Schema]:
    names = st.sampled_from(["name", "ports", "items", "properties", "additionalProperties", "$ref", "type", "a/b~c"])
    leaves = st.sampled_from(["string", "integer", "boolean"]).map(leaf)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(names, inner, max_size=4).map(table), inner.map(rows), inner.map(mapping)
        ),
        max_leaves=20,
    )


def resolved(node: object, definitions: dict[str, object]) -> object:
    """A sub-schema with its references followed, fields named `$ref` told from references by what holds them."""
    assert isinstance(node, dict)
    if isinstance(node.get("$ref"), str):
        return resolved(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    result = dict(node)
    if "properties" in node:
        result["properties"] = {name: resolved(child, definitions) for name, child in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            result[key] = resolved(node[key], definitions)
    return result


def plain(node: Schema) -> Schema:
    """What the compact form of a generated node is, written down again without sharing."""
    result = {key: value for key, value in node.items() if key != "description"}
    properties = node.get("properties")
    if isinstance(properties, dict):
        result |= {"properties": {name: plain(child) for name, child in properties.items()}}
        result |= {"additionalProperties": False}
    for key in ("items", "additionalProperties"):
        child = node.get(key)
        if isinstance(child, dict):
            result[key] = plain(child)
    return result


@settings(deadline=None, max_examples=50)
@given(spec=nodes(), other=nodes())
def test_sharing_changes_nothing_but_the_size(spec: Schema, other: Schema) -> None:
    both = table({"one": spec, "two": other, "again": rows(spec)})
    definitions = derive([crd(both), crd(both, kind="RayOther")], source="a test")["$defs"]
    assert isinstance(definitions, dict)
    for kind in ("RayThing", "RayOther"):
        whole = resolved(definitions[f"ray.io/v1/{kind}"], definitions)
        assert isinstance(whole, dict)
        assert whole["properties"]["spec"] == plain(both)


def test_folders_without_usable_crds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"no CustomResourceDefinition of ray\.io in 0 YAML files"):
        read_crds(tmp_path)
    (tmp_path / "other.yaml").write_text("kind: ConfigMap\n")
    with pytest.raises(SchemaError, match="in 1 YAML file there"):
        read_crds(tmp_path)
    (tmp_path / "broken.yaml.gz").write_bytes(gzip.compress(b"kind: RayCluster")[:-4])
    with pytest.raises(SchemaError, match=r"broken\.yaml\.gz: cannot be read"):
        read_crds(tmp_path)
    with pytest.raises(SchemaError, match="no version with a schema is served"):
        derive([crd({"type": "object"}, deprecated=True)], source="old ones")
    torn = crd({"type": "object"})
    torn["spec"] = {"group": "ray.io", "versions": [{"name": "v1", "served": True}]}
    with pytest.raises(SchemaError, match=r"CRDs = torn: one of ray\.io is not whole \(KeyError: 'names'\)"):
        derive([torn], source="torn")


def test_crds_are_read_zipped_or_not(tmp_path: Path) -> None:
    text = yaml.safe_dump(crd({"type": "object"}))
    (tmp_path / "plain.yaml").write_text(f"---\n{text}")
    (tmp_path / "zipped.yaml.gz").write_bytes(gzip.compress(yaml.safe_dump(crd(TEXT, kind="RayOther")).encode()))
    assert len(read_crds(tmp_path)) == 2
    out = tmp_path / "schema.json"
    assert main([str(tmp_path), "--version", "9.9", "--out", str(out)]) == 0
    schema = json.loads(out.read_text())
    assert schema["$comment"] == "KubeRay 9.9"
    assert out.read_text() == schema_text(schema)
    assert {"ray.io/v1/RayThing", "ray.io/v1/RayOther"} <= schema["$defs"].keys()


def test_the_shipped_schema_is_small_attributed_and_a_schema() -> None:
    schema = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert SHIPPED.stat().st_size <= MAX_SHIPPED_BYTES
    Draft202012Validator.check_schema(schema)
    notice = (SHIPPED.parent.parent / "NOTICE").read_text(encoding="utf-8")
    assert schema["$comment"] in notice
    assert SHIPPED.name in notice
    kinds = {"RayCluster", "RayJob", "RayService", "Deployment", "Service", "NetworkPolicy", "PersistentVolumeClaim"}
    assert {key.rpartition("/")[2] for key in schema["$defs"] if "/" in key} == kinds
