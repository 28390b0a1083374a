"""The manifests as they lie in the checkout, and what Kubernetes would make of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import KUBERAY

FILES = sorted(KUBERAY.rglob("*.yaml"))
SMALL = KUBERAY / "small" / "kustomization.yaml"

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def applied(operations: list[Manifest], to: Manifest) -> Manifest:
    """The object after the operations of a JSON patch (RFC 6902), which must each find what they change."""
    result = copy.deepcopy(to)
    for operation in operations:
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place: Any = result
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        key: Any = int(last) if isinstance(place, list) and last != "-" else last
        if operation["op"] == "remove":
            del place[key]
        elif operation["op"] == "replace":
            assert place[key] is not None
            place[key] = operation["value"]
        elif isinstance(place, list):
            assert (operation["op"], last) == ("add", "-")
            place.append(operation["value"])
        else:
            assert operation["op"] == "add"
            assert key not in place
            place[key] = operation["value"]
    return result


def small_objects() -> list[Manifest]:
    """What `kubectl apply -k cluster/kuberay/small` would send: the base's objects, patched."""
    overlay = documents(SMALL)[0]
    (base,) = overlay["resources"]
    folder = (SMALL.parent / base).resolve()
    assert not SMALL.is_relative_to(folder), "kustomize refuses a base that contains its overlay"
    names = documents(folder / "kustomization.yaml")[0]["resources"]
    objects = [one for name in names for one in documents(folder / name)]
    for patch in overlay["patches"]:
        target = patch["target"]
        (index,) = [
            index
            for index, one in enumerate(objects)
            if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        objects[index] = applied(yaml.safe_load(patch["patch"]), objects[index])
    return objects


def all_objects() -> list[Manifest]:
    """Every object of every file, and of the overlay."""
    return [one for path in FILES for one in documents(path) if one["kind"] != "Kustomization"] + small_objects()


def cluster_specs(manifest: Manifest) -> list[Manifest]:
    """The specification of a Ray cluster in an object, if it has one."""
    specs = {"RayCluster": ["spec"], "RayJob": ["spec", "rayClusterSpec"]}
    if manifest["kind"] not in specs:
        return []
    found = manifest
    for part in specs[manifest["kind"]]:
        found = found[part]
    return [found]


def pods_of(manifest: Manifest) -> Iterator[Manifest]:
    """All pod templates of an object, found by their shape."""

    def walk(node: object) -> Iterator[Manifest]:
        if isinstance(node, dict):
            spec = node.get("spec")
            if isinstance(spec, dict) and "containers" in spec:
                yield node
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, list):
            for child in node:
                yield from walk(child)

    yield from walk(manifest)


def containers_of(manifest: Manifest) -> Iterator[Manifest]:
    """All containers of an object, the autoscaler's settings among them."""
    for pod in pods_of(manifest):
        yield from pod["spec"]["containers"]
        yield from pod["spec"].get("initContainers", [])
    for spec in cluster_specs(manifest):
        if "autoscalerOptions" in spec:
            yield {"name": "autoscaler"} | spec["autoscalerOptions"]
