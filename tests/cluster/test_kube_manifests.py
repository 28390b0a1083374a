"""The manifests: that they are what their source makes, safe, and at one with Ray, the recipes and each other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_files import (
    FILES,
    Manifest,
    all_objects,
    applied,
    cluster_specs,
    containers_of,
    documents,
    pods_of,
    small_objects,
)

from cluster.layout import DRIVER, FULL, RUN_DIR, SHARED, SMALL, STOP_WAIT_S, TERMINATION_S, USER_ID, Layout
from cluster.layout import settings as recipe_settings
from cluster.manifests import KUBERAY, default_image, entrypoint, main, patch_between, platform, ray_job, rendered
from rexrag.config import KEYS
from rexrag.recipe import nearest_key

ROOT = KUBERAY.parent.parent
OBJECTS = all_objects()
PODS = [(one, pod) for one in OBJECTS for pod in pods_of(one)]
CONTAINERS = [(one, container) for one in OBJECTS for container in containers_of(one)]
CLUSTERS = [spec for one in OBJECTS for spec in cluster_specs(one)]
LAYOUTS = pytest.mark.parametrize("layout", [FULL, SMALL], ids=["full", "small"])


def test_the_files_are_what_the_source_makes(tmp_path: Path) -> None:
    made = dict(rendered(default_image()))
    assert sorted(made) == [str(path.relative_to(KUBERAY)) for path in FILES]
    for path in FILES:
        assert path.read_text(encoding="utf-8") == made[str(path.relative_to(KUBERAY))], (
            "run `python -m cluster.manifests` and commit what it writes"
        )
    assert main(["--image", "registry/mine:1", "--out", str(tmp_path)]) == 0
    images = {
        one["image"]
        for path in tmp_path.rglob("ray*.yaml")
        for o in documents(path)
        for one in containers_of(o)
        if "image" in one
    }
    assert images == {"registry/mine:1"}


def test_the_overlay_makes_the_small_cluster_of_the_base() -> None:
    image = default_image()
    assert small_objects() == [*platform(SMALL, image), ray_job(SMALL, image)]


VALUES = st.recursive(
    st.booleans() | st.integers(0, 3) | st.sampled_from(["a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b/c", "d~e"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(old=st.dictionaries(st.sampled_from("xyz"), VALUES), new=st.dictionaries(st.sampled_from("xyz"), VALUES))
def test_a_patch_makes_the_one_of_the_other(old: Manifest, new: Manifest) -> None:
    operations: list[Any] = patch_between(old, new)
    assert json.dumps(applied(operations, old), sort_keys=True) == json.dumps(new, sort_keys=True)


def test_the_small_cluster_needs_no_gpu_no_redis_and_no_autoscaler() -> None:
    (spec,) = [spec for one in small_objects() for spec in cluster_specs(one)]
    for one in (spec, *cluster_specs(documents(KUBERAY / "small" / "raycluster.yaml")[0])):
        assert one == spec
        assert "nvidia" not in json.dumps(one)
        assert "gcsFaultToleranceOptions" not in one
        assert "autoscalerOptions" not in one
        assert one["enableInTreeAutoscaling"] is False
        rollout = [group for group in one["workerGroupSpecs"] if "rollout" in group["resources"]]
        assert [(group["minReplicas"], group["maxReplicas"]) for group in rollout] == [(1, 1)]


def test_there_are_pods_and_containers_to_look_at() -> None:
    kinds = {one["kind"] for one, _ in PODS}
    assert kinds == {"RayJob", "RayCluster", "Deployment"}
    names = {container["name"] for _, container in CONTAINERS}
    assert names == {"ray-head", "ray-worker", "submitter", "board", "wait-for-run", "autoscaler"}


@pytest.mark.parametrize(("manifest", "pod"), PODS)
def test_no_pod_is_root_or_has_more_than_it_needs(manifest: Manifest, pod: Manifest) -> None:
    spec = pod["spec"]
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (USER_ID, USER_ID, USER_ID)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    autoscaler = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "head" and any(
        one["enableInTreeAutoscaling"] for one in cluster_specs(manifest)
    )
    assert spec["automountServiceAccountToken"] is autoscaler, "the token is for the autoscaler, beside the head"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


@pytest.mark.parametrize(("manifest", "container"), CONTAINERS)
def test_no_container_gains_rights(manifest: Manifest, container: Manifest) -> None:
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True
    assert security["runAsNonRoot"] is True
    assert "privileged" not in security
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/tmp", "/home/rexrag"} <= writable


@pytest.mark.parametrize(("manifest", "container"), CONTAINERS)
def test_every_container_says_what_it_uses(manifest: Manifest, container: Manifest) -> None:
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["requests"].keys() >= {"cpu", "memory"}
    if "image" in container:
        assert re.fullmatch(r"[^:]+:(?!latest)[\w.]+", container["image"])


@pytest.mark.parametrize(("manifest", "pod"), PODS)
def test_pods_that_stay_are_probed_and_mount_only_what_they_have(manifest: Manifest, pod: Manifest) -> None:
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert len(set(volumes)) == len(volumes)
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    for container in pod["spec"]["containers"]:
        if container["name"] != "submitter":
            assert container["readinessProbe"]["httpGet"]
            assert container["livenessProbe"]["httpGet"]


def test_secrets_are_named_and_never_written() -> None:
    for spec in CLUSTERS:
        assert spec["authOptions"] == {"mode": "token", "secretName": "rexrag-token"}
        if "gcsFaultToleranceOptions" in spec:
            password = spec["gcsFaultToleranceOptions"]["redisPassword"]
            assert password == {"valueFrom": {"secretKeyRef": {"name": "rexrag-redis", "key": "password"}}}
    text = "".join(path.read_text(encoding="utf-8") for path in FILES)
    assert "stringData" not in text
    assert "kind: Secret" not in text


def test_the_head_holds_no_part_of_a_run_and_each_part_has_a_place() -> None:
    for spec in CLUSTERS:
        assert spec["headGroupSpec"]["resources"] == {"CPU": "0"}
        held = [name for group in spec["workerGroupSpecs"] for name in group["resources"]]
        assert sorted(held) == ["driver", "learner", "retriever", "rollout"]
        (learner,) = [group["resources"] for group in spec["workerGroupSpecs"] if "learner" in group["resources"]]
        assert DRIVER in learner, "the job's own process dies with the learner's node at the latest, not with the head"


def test_what_the_operator_refuses_is_not_asked_for() -> None:
    """Rules of the operator's code that its CRDs do not state."""
    for spec in CLUSTERS:
        assert spec["rayVersion"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
        names = [group["groupName"] for group in spec["workerGroupSpecs"]]
        assert len(set(names)) == len(names)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            started = {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys()
            assert not (started and group["resources"]), "resources belong to one of the two"
            assert "restartPolicy" not in group["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for one in OBJECTS:
        name = one["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 47


def test_ports_are_closed_but_to_whom_needs_them() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"}
    closed = policies.pop("rexrag-closed")
    assert closed["ingress"] == []
    for manifest, pod in PODS:
        labels = pod["metadata"]["labels"]
        assert closed["podSelector"]["matchLabels"].items() <= labels.items(), manifest["kind"]
    for name, policy in policies.items():
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            assert rule["from"], name
            assert not [peer for peer in rule["from"] if "ipBlock" in peer]
            assert rule.get("ports") or name == "rexrag-ray", "the pods of a Ray cluster reach one another on all ports"
    peers = [peer for policy in policies.values() for rule in policy["ingress"] for peer in rule["from"]]
    other_namespaces = [peer for peer in peers if "namespaceSelector" in peer]
    assert [peer["namespaceSelector"]["matchLabels"] for peer in other_namespaces] == [
        {"kubernetes.io/metadata.name": "ray-system"}
    ]


def test_tensorboard_reads_the_runs_folder_through_its_service() -> None:
    (board,) = [one for one in documents(KUBERAY / "base" / "platform.yaml") if one["kind"] == "Deployment"]
    (service,) = [one for one in documents(KUBERAY / "base" / "platform.yaml") if one["kind"] == "Service"]
    pod = board["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert board["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert service["spec"]["type"] == "ClusterIP"
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["command"][:3] == ["rexrag", "board", RUN_DIR]
    mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"] == SHARED]
    assert mounts == [{"name": "shared", "mountPath": SHARED, "readOnly": True}]


def words_that_reach_ray(command: str) -> list[str]:
    """An entry point as the job's process gets it: through KubeRay's bash, Ray's command line, and the job's shell."""
    submitted = subprocess.run(
        ["bash", "-ec", "--", f"printf '%s\\0' {command} ;"], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split("\0")[:-1]
    run = subprocess.list2cmdline(submitted)  # as `ray job submit` joins them
    return subprocess.run(
        f"printf '%s\\0' {run}", shell=True, capture_output=True, text=True, check=True, timeout=30
    ).stdout.split("\0")[:-1]


@LAYOUTS
def test_the_job_is_the_command_that_was_meant(layout: Layout) -> None:
    command = ray_job(layout, default_image())["spec"]
    assert isinstance(command, dict)
    words = words_that_reach_ray(command["entrypoint"])
    assert words == shlex.split(entrypoint(layout))
    assert words[:5] == ["rexrag", "train", layout.recipe, "--run-dir", RUN_DIR]
    assert Path(RUN_DIR).is_relative_to(SHARED)
    settled = [word for before, word in pairwise(words) if before == "--set"]
    assert settled == [f"{key}={value}" for key, value in recipe_settings(layout).items()]


@LAYOUTS
def test_settings_ask_for_nodes_that_the_cluster_has(layout: Layout) -> None:
    held = {name for group in layout.groups for name in group.resources}
    for key, text in recipe_settings(layout).items():
        value = tomllib.loads(f"value = {text}")["value"]
        if key.endswith(".resources"):
            assert set(value) <= held
        elif key.endswith(".num_gpus"):
            assert value == next(group.gpus for group in layout.groups if f"{group.name}.num_gpus" == key)
        else:
            assert value == {"min": layout.rollout.replicas, "max": layout.rollout.max_replicas}


def test_recipe_keys_in_the_manifests_exist() -> None:
    for key in {*recipe_settings(FULL), *recipe_settings(SMALL)}:
        assert key in KEYS, f"`{key}`; the nearest is `{nearest_key(key)}`"


def test_a_try_that_fails_is_followed_by_one_on_a_new_cluster_and_the_same_run_folder() -> None:
    (job,) = documents(KUBERAY / "base" / "rayjob.yaml")
    spec = job["spec"]
    assert spec["backoffLimit"] >= 1
    assert "clusterSelector" not in spec, "KubeRay retries only on clusters of the job's own"
    assert "jobId" not in spec, "each try is a job of its own"
    assert "--resume" not in spec["entrypoint"], "an existing run folder is gone on with unless told otherwise"
    assert spec["shutdownAfterJobFinishes"] is True
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods_of(job)
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {one["metadata"]["name"] for one in OBJECTS if one["kind"] == "PersistentVolumeClaim"}


def test_a_stop_and_an_eviction_leave_time() -> None:
    (job,) = documents(KUBERAY / "base" / "rayjob.yaml")
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    for group in (group for spec in CLUSTERS for group in spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        variables = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        drain_s = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 0 < drain_s < pod["terminationGracePeriodSeconds"] == TERMINATION_S
