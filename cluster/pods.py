"""Pods of a cluster on Kubernetes, as KubeRay's manifests embed them: nobody is root, nothing gains rights.

Root file systems are read-only. What a process writes goes to `/tmp` and its home, which end with the pod, or to the
shared volume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.layout import (
    AGENT_PORT,
    BOARD_PORT,
    CLAIM,
    DASHBOARD_PORT,
    DRAIN_S,
    GCS_PORT,
    NAME,
    RUN_DIR,
    SHARED,
    TERMINATION_S,
    USER_ID,
    Group,
)

Object = dict[str, object]

PART_OF: Final = "app.kubernetes.io/part-of"
COMPONENT: Final = "app.kubernetes.io/component"
HOME: Final = "/home/rexrag"
_GIB: Final = "Gi"


def labels(component: str) -> dict[str, str]:
    """What the network policies and people find a pod by."""
    return {PART_OF: NAME, COMPONENT: component}


def head_pod(image: str, *, cpus: int, memory_gib: int, autoscaled: bool) -> Object:
    """The pod of the head; its service account's token is there for the autoscaler alone."""
    container = _ray_container("ray-head", image, cpus=cpus, memory_gib=memory_gib, gpus=0)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": GCS_PORT},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
    ]
    return _pod("head", container, scratch_gib=10, shared=True, api_token=autoscaled)


def worker_pod(image: str, group: Group) -> Object:
    """One pod of a worker group."""
    container = _ray_container("ray-worker", image, cpus=group.cpus, memory_gib=group.memory_gib, gpus=group.gpus)
    pod = _pod(group.name, container, scratch_gib=group.scratch_gib, shared=True)
    _environment(container, {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)})
    spec = pod["spec"]
    assert isinstance(spec, dict)
    spec["terminationGracePeriodSeconds"] = TERMINATION_S
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def submitter_pod(image: str) -> Object:
    """The pod that submits a RayJob's entry point and follows its log; KubeRay gives it its command."""
    container = _container("submitter", image, cpu="500m", memory="1Gi")
    pod = _pod("submitter", container, scratch_gib=1, shared=False)
    spec = pod["spec"]
    assert isinstance(spec, dict)
    spec["restartPolicy"] = "Never"
    return pod


def board_pod(image: str) -> Object:
    """TensorBoard over the run folder, which it reads only; it waits for the folder to appear."""
    container = _container("board", image, cpu="1", memory="2Gi")
    container["command"] = ["rexrag", "board", RUN_DIR, "--host", "0.0.0.0", "--port", str(BOARD_PORT)]
    container["ports"] = [{"name": "http", "containerPort": BOARD_PORT}]
    page = {"path": "/", "port": "http"}
    container["readinessProbe"] = _probe(page, delay_s=5, period_s=10, failures=3)
    container["livenessProbe"] = _probe(page, delay_s=60, period_s=30, failures=5)
    wait = _container("wait-for-run", image, cpu="100m", memory="128Mi")
    wait["command"] = ["sh", "-c", f"until test -d {RUN_DIR}; do sleep 5; done"]
    pod = _pod("board", container, scratch_gib=1, shared=True, read_only=True)
    spec = pod["spec"]
    assert isinstance(spec, dict)
    wait["volumeMounts"] = container["volumeMounts"]
    spec["initContainers"] = [wait]
    return pod


def container_security() -> Object:
    """What no container may do; the pod's own settings say who it is."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def scratch_mounts() -> list[Object]:
    """Where a process may write to while its root file system is read-only."""
    return [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]


def fixed(resources: Mapping[str, str]) -> Object:
    """Requests that are the limits: Ray counts what a pod is limited to, and nothing else should use it."""
    return {"requests": dict(resources), "limits": dict(resources)}


def _ray_container(name: str, image: str, *, cpus: int, memory_gib: int, gpus: int) -> Object:
    container = _container(name, image, cpu=str(cpus), memory=f"{memory_gib}{_GIB}", gpus=gpus)
    _environment(container, {"HF_HOME": f"{SHARED}/huggingface"})  # all pods share one copy of a model from the hub
    health = {"path": "/api/healthz", "port": AGENT_PORT}
    container["readinessProbe"] = _probe(health, delay_s=10, period_s=5, failures=10)
    # Ten minutes: a node waits that long for a head that comes back.
    container["livenessProbe"] = _probe(health, delay_s=30, period_s=5, failures=120)
    return container


def _container(name: str, image: str, *, cpu: str, memory: str, gpus: int = 0) -> Object:
    amounts = {"cpu": cpu, "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "resources": fixed(amounts),
        "securityContext": container_security(),
    }


def _environment(container: Object, values: Mapping[str, str]) -> None:
    variables = container.setdefault("env", [])
    assert isinstance(variables, list)
    variables += [{"name": name, "value": value} for name, value in values.items()]


def _probe(request: Mapping[str, object], *, delay_s: int, period_s: int, failures: int) -> Object:
    return {
        "httpGet": dict(request),
        "initialDelaySeconds": delay_s,
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _pod(
    component: str,
    container: Object,
    *,
    scratch_gib: int,
    shared: bool,
    read_only: bool = False,
    api_token: bool = False,
) -> Object:
    """A pod template around one container; it gets the mounts here."""
    mounts = scratch_mounts()
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{scratch_gib}{_GIB}"}},
        {"name": "home", "emptyDir": {"sizeLimit": f"{scratch_gib}{_GIB}"}},
    ]
    if shared:
        mounts.append({"name": "shared", "mountPath": SHARED} | ({"readOnly": True} if read_only else {}))
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}})
    container["volumeMounts"] = mounts
    return {
        "metadata": {"labels": labels(component)},
        "spec": {
            "automountServiceAccountToken": api_token,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }
