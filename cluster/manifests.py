"""KubeRay's manifests, made from cluster/layout.py.

python -m cluster.manifests                          writes cluster/kuberay/
python -m cluster.manifests --image IMAGE --out DIR  the same for an image of your own, elsewhere
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

from cluster.layout import (
    BOARD_PORT,
    CLAIM,
    DASHBOARD_PORT,
    DRIVER,
    FULL,
    JOB,
    NAME,
    OPERATOR_NAMESPACE,
    REDIS_ADDRESS,
    REDIS_SECRET,
    RETRIES,
    ROOT,
    RUN_DIR,
    SMALL,
    STOP_WAIT_S,
    TOKEN_SECRET,
    Group,
    Layout,
    settings,
    versions,
)
from cluster.pods import (
    COMPONENT,
    PART_OF,
    Object,
    board_pod,
    container_security,
    fixed,
    head_pod,
    labels,
    scratch_mounts,
    submitter_pod,
    worker_pod,
)

KUBERAY: Final = ROOT / "cluster" / "kuberay"
_MADE: Final = (
    "# Made by `python -m cluster.manifests` from cluster/layout.py: change that file, and make this one again.\n"
)
_RAY_PODS: Final = {PART_OF: NAME, "ray.io/is-ray-node": "yes"}


def default_image() -> str:
    """The image's name without a registry; `kustomize edit set image` or `--image` puts yours in its place."""
    return f"rexrag:{versions()[0]}"


def cluster_spec(layout: Layout, image: str) -> Object:
    """What RayCluster and RayJob share: the head, which holds no part of a run, and the groups of workers."""
    spec: Object = {"rayVersion": versions()[1], "authOptions": {"mode": "token", "secretName": TOKEN_SECRET}}
    if layout.redis:
        password = {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}}
        spec["gcsFaultToleranceOptions"] = {"redisAddress": REDIS_ADDRESS, "redisPassword": password}
    spec["enableInTreeAutoscaling"] = layout.autoscaled
    if layout.autoscaled:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "resources": fixed({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": container_security(),
            "volumeMounts": scratch_mounts(),
        }
    pod = head_pod(image, cpus=layout.head_cpus, memory_gib=layout.head_memory_gib, autoscaled=layout.autoscaled)
    spec["headGroupSpec"] = {
        "resources": {"CPU": "0"},
        "rayStartParams": {"dashboard-host": "0.0.0.0"},
        "template": pod,
    }
    spec["workerGroupSpecs"] = [_worker_group(group, image) for group in layout.groups]
    return spec


def _worker_group(group: Group, image: str) -> Object:
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": group.max_replicas,
        "resources": {name: str(amount) for name, amount in group.resources.items()},
        "rayStartParams": {},
        "template": worker_pod(image, group),
    }


def ray_cluster(layout: Layout, image: str) -> Object:
    """A cluster that stays, for runs that `rexrag submit` or `ray job submit` sends to it."""
    return _object("ray.io/v1", "RayCluster", NAME, cluster_spec(layout, image), component="cluster")


def ray_job(layout: Layout, image: str) -> Object:
    """One run on a cluster of its own. A try that fails is followed by another, on a new cluster, which resumes."""
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    spec: Object = {
        "entrypoint": entrypoint(layout),
        "entrypointResources": json.dumps({DRIVER: 1}),
        "runtimeEnvYAML": yaml.safe_dump(environment),
        "submissionMode": "K8sJobMode",
        "backoffLimit": RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "submitterPodTemplate": submitter_pod(image),
        "rayClusterSpec": cluster_spec(layout, image),
    }
    return _object("ray.io/v1", "RayJob", JOB, spec, component="job")


def entrypoint(layout: Layout) -> str:
    """The job's command. Bash reads it once, and would take a comma in braces for two words: hence the quotes."""
    words = [f"--set '{key}={value}'" for key, value in settings(layout).items()]
    return " ".join(["rexrag", "train", layout.recipe, "--run-dir", RUN_DIR, *words])


def platform(layout: Layout, image: str) -> list[Object]:
    """What a run needs beside its cluster: storage, closed ports, TensorBoard."""
    size = {"requests": {"storage": f"{layout.storage_gib}Gi"}}
    claim: Object = {"accessModes": ["ReadWriteMany"], "resources": size}
    board: Object = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels("board")},
        "template": board_pod(image),
    }
    service: Object = {
        "type": "ClusterIP",
        "selector": labels("board"),
        "ports": [{"name": "http", "port": BOARD_PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return [
        _object("v1", "PersistentVolumeClaim", CLAIM, claim, component="storage"),
        *network_policies(),
        _object("apps/v1", "Deployment", "rexrag-board", board, component="board"),
        _object("v1", "Service", "rexrag-board", service, component="board"),
    ]


def network_policies() -> list[Object]:
    """Nothing reaches a pod of these manifests but what it needs; what they reach is not limited."""
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": OPERATOR_NAMESPACE}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    submitter = {"podSelector": {"matchLabels": labels("submitter")}}
    rules: list[tuple[str, Mapping[str, str], list[Object]]] = [
        ("rexrag-closed", {PART_OF: NAME}, []),
        ("rexrag-ray", _RAY_PODS, [{"from": [{"podSelector": {"matchLabels": dict(_RAY_PODS)}}]}]),
        (
            "rexrag-head",
            _RAY_PODS | {COMPONENT: "head"},
            [{"from": [submitter, operator], "ports": [_tcp(DASHBOARD_PORT)]}],
        ),
        ("rexrag-board", labels("board"), [{"from": [{"podSelector": {}}], "ports": [_tcp(BOARD_PORT)]}]),
    ]
    return [
        _object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            name,
            {"podSelector": {"matchLabels": dict(pods)}, "policyTypes": ["Ingress"], "ingress": ingress},
            component="network",
        )
        for name, pods, ingress in rules
    ]


def _tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


def _object(version: str, kind: str, name: str, spec: Object, *, component: str) -> Object:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": labels(component)},
        "spec": spec,
    }


def patch_between(old: object, new: object, path: str = "") -> list[Object]:
    """Operations of a JSON patch (RFC 6902) that make one object of another; lists lose and gain entries at the end."""
    operations: list[Object] = []
    if isinstance(old, list) and isinstance(new, list):
        common = min(len(old), len(new))
        for index in range(common):
            operations += patch_between(old[index], new[index], f"{path}/{index}")
        operations += [{"op": "remove", "path": f"{path}/{index}"} for index in reversed(range(common, len(old)))]
        return operations + [{"op": "add", "path": f"{path}/-", "value": value} for value in new[common:]]
    if not isinstance(old, dict) or not isinstance(new, dict):
        # For Python true is 1.
        return [] if old == new and type(old) is type(new) else [{"op": "replace", "path": path, "value": new}]
    for name in old | new:
        place = f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}"
        if name not in new:
            operations.append({"op": "remove", "path": place})
        elif name not in old:
            operations.append({"op": "add", "path": place, "value": new[name]})
        else:
            operations += patch_between(old[name], new[name], place)
    return operations


def files(image: str) -> dict[str, list[Object]]:
    """All files by their path below the folder, each as its documents.

    The overlay lies beside its base: kustomize refuses a base that contains it.
    """
    base = [*platform(FULL, image), ray_job(FULL, image)]
    small = [*platform(SMALL, image), ray_job(SMALL, image)]
    overlay = {
        "resources": ["../base"],
        "patches": [_patch(old, new) for old, new in zip(base, small, strict=True) if old != new],
    }
    return {
        "base/platform.yaml": platform(FULL, image),
        "base/rayjob.yaml": [ray_job(FULL, image)],
        "base/raycluster.yaml": [ray_cluster(FULL, image)],
        "base/kustomization.yaml": [_kustomization({"resources": ["platform.yaml", "rayjob.yaml"]})],
        "small/kustomization.yaml": [_kustomization(overlay)],
        "small/raycluster.yaml": [ray_cluster(SMALL, image)],
    }


def _patch(old: Object, new: Object) -> Object:
    """One entry of a kustomization's patches."""
    metadata = old["metadata"]
    assert isinstance(metadata, dict)
    return {
        "target": {"kind": old["kind"], "name": metadata["name"]},
        "patch": _yaml(patch_between(old, new)),
    }


def _kustomization(fields: Object) -> Object:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"} | fields


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # pyyaml has no types
    """Plain YAML: parts that are the same object are written out, texts of several lines stay readable."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _yaml(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)
    return text


def rendered(image: str) -> Iterator[tuple[str, str]]:
    """All files as (path below the folder, text)."""
    for name, documents in files(image).items():
        yield name, _MADE + "---\n".join(_yaml(document) for document in documents)


def main(words: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.manifests", description="Write KubeRay's manifests.")
    parser.add_argument("--image", default=default_image(), help="image of all pods (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=KUBERAY, help="folder to write to (default: cluster/kuberay)")
    options = parser.parse_args(words)
    for name, text in rendered(options.image):
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
