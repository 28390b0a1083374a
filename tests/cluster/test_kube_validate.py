"""The strict check of manifests: what is refused, where it is said to be, and what is said to be meant."""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_files import FILES, documents, small_objects

from cluster.manifests import KUBERAY
from cluster.validate_manifests import check_file, load_checker, main

ROOT = KUBERAY.parent.parent
CHECKER = load_checker()
JOB_FILE = KUBERAY / "base" / "rayjob.yaml"
PLATFORM_FILE = KUBERAY / "base" / "platform.yaml"
JOB = JOB_FILE.read_text(encoding="utf-8")
PLATFORM = PLATFORM_FILE.read_text(encoding="utf-8")


def problems(text: str, folder: Path) -> list[str]:
    path = folder / "changed.yaml"
    path.write_text(text, encoding="utf-8")
    return [problem.removeprefix(f"{path}:") for problem in check_file(path, CHECKER)]


def changed(text: str, old: str, new: str) -> tuple[str, int]:
    """The text with the first of these words changed, and their line."""
    assert old in text, f"nothing to change: {old!r}"
    return text.replace(old, new, 1), text.partition(old)[0].count("\n") + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERAY)))
def test_every_manifest_is_valid(path: Path) -> None:
    assert check_file(path, CHECKER) == []


def test_the_small_overlay_is_valid(tmp_path: Path) -> None:
    assert problems(yaml.safe_dump_all(small_objects()), tmp_path) == []


OPEN = {"labels", "matchLabels", "limits", "requests", "resources", "rayStartParams"}
"""Tables whose keys are the user's own."""


def places(node: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all keys of an object that must be known ones."""
    if isinstance(node, dict):
        for name, child in node.items():
            if not path or (path[-1] not in OPEN and "/" not in name):
                yield (*path, name)
            yield from places(child, (*path, name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from places(child, (*path, index))


OBJECTS = {f"{one['kind']} {one['metadata']['name']}": one for one in [*documents(JOB_FILE), *documents(PLATFORM_FILE)]}
PLACES = [
    (title, path)
    for title, one in OBJECTS.items()
    for path in places(one)
    if path not in (("kind",), ("metadata",), ("metadata", "name"))  # these say which object it is
]


def dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def test_the_places_reach_deep() -> None:
    assert max(len(path) for _, path in PLACES) >= 10
    assert len({title for title, _ in PLACES}) >= 8


@settings(deadline=None, max_examples=40)
@given(place=st.sampled_from(PLACES), swap=st.booleans())
def test_a_typing_error_is_refused_wherever_it_is(place: tuple[str, tuple[str | int, ...]], swap: bool) -> None:
    title, path = place
    *way, name = path
    assert isinstance(name, str)
    typo = f"{name[:-2]}{name[-1]}{name[-2]}" if swap and name[-1] != name[-2] else f"{name}s"
    changed_object = copy.deepcopy(OBJECTS[title])
    table: Any = changed_object
    for part in way:
        table = table[part]
    table[typo] = table.pop(name)
    with tempfile.TemporaryDirectory() as folder:
        found = problems(yaml.safe_dump(changed_object), Path(folder))
    if path == ("apiVersion",):
        assert "apiVersion None has no schema" in found[0]
        return
    told = [one for one in found if "is missing" not in one]
    assert len(told) == 1
    assert f": {title}: {dotted((*way, typo))}: unknown field; the nearest known one is `{name}`" in told[0]


@pytest.mark.parametrize(
    ("old", "new", "known"),
    [
        ("backoffLimit: 3", "backofLimit: 3", "backoffLimit"),
        ("redisAddress: redis:6379", "redisAdress: redis:6379", "redisAddress"),
        ("groupName: learner", "group_name: learner", "groupName"),
    ],
)
def test_the_line_of_a_typing_error_is_named(old: str, new: str, known: str, tmp_path: Path) -> None:
    text, line = changed(JOB, old, new)
    found = [one for one in problems(text, tmp_path) if "unknown field" in one]
    assert len(found) == 1
    assert found[0].startswith(f"{line}: RayJob rexrag-train: spec.")
    assert found[0].endswith(f"the nearest known one is `{known}`")


@pytest.mark.parametrize(
    ("kind", "old", "new", "path", "known"),
    [
        ("Deployment rexrag-board", "  replicas: 1", "  replica: 1", "spec.replica", "replicas"),
        ("Service rexrag-board", "targetPort:", "targetport:", "spec.ports[0].targetport", "targetPort"),
        ("NetworkPolicy rexrag-closed", "policyTypes:", "policyType:", "spec.policyType", "policyTypes"),
        ("PersistentVolumeClaim rexrag-shared", "accessModes:", "accessMode:", "spec.accessMode", "accessModes"),
    ],
)
def test_kinds_of_kubernetes_itself_are_checked_too(
    kind: str, old: str, new: str, path: str, known: str, tmp_path: Path
) -> None:
    text, _ = changed(PLATFORM, old, new)
    (found,) = [one for one in problems(text, tmp_path) if "unknown field" in one]
    assert f": {kind}: {path}: unknown field; the nearest known one is `{known}`" in found


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("CPU: '0'", "CPU: 0", 'headGroupSpec.resources.CPU: = 0: must be text; put it in quotes: "0"'),
        ("rayVersion: 2.60.0", "rayVersion: 2.6", 'rayVersion: = 2.6: must be text; put it in quotes: "2.6"'),
        ("backoffLimit: 3", "backoffLimit: three", "spec.backoffLimit: = three: must be a whole number"),
        ("backoffLimit: 3", "backoffLimit: true", "spec.backoffLimit: = true: must be a whole number"),
        ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: 'yes'", "= yes: must be true or false"),
        ("cpu: 500m", "cpu: a-lot", "resources.requests.cpu: = a-lot: must be a quantity, such as 2, 500m or 16Gi"),
        ("cpu: 500m", "cpu: 0.5", "resources.requests.cpu: = 0.5: must be a whole number or text"),
        ("mode: token", "mode: tokens", "authOptions.mode: = tokens: must be one of disabled, token"),
        (
            "resources:\n          learner: '1'",
            "resources: ['1']\n        labels:\n          a: '1'",
            "must be a table",
        ),
        ("      - groupName: learner\n        replicas: 1", "      - replicas: 1", "[0].groupName: is missing"),
        ("apiVersion: ray.io/v1", "apiVersion: ray.io/v1beta1", "apiVersion ray.io/v1beta1 has no schema; known: "),
        ("kind: RayJob", "kind: RayJobs", "RayJobs rexrag-train: apiVersion ray.io/v1 has no schema; known: "),
        ("kind: RayJob", "sort: RayJob", "is no Kubernetes object: `apiVersion` and `kind` are missing"),
        ("  backoffLimit: 3", "  backoffLimit: 3\n  backoffLimit: 0", "spec.backoffLimit: is given twice in one table"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, told: str, tmp_path: Path) -> None:
    text, _ = changed(JOB, old, new)
    found = problems(text, tmp_path)
    assert any(told in one for one in found), found
    assert len(found) <= 2


def test_a_repeated_key_inside_a_list_is_found(tmp_path: Path) -> None:
    text, line = changed(JOB, "        - name: submitter\n", "        - name: submitter\n          name: other\n")
    (found,) = problems(text, tmp_path)
    assert found.startswith(f"{line + 1}: RayJob rexrag-train: spec.submitterPodTemplate.spec.containers[0].name: ")


def test_each_problem_is_said_once_and_by_line(tmp_path: Path) -> None:
    text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {}\nspec:\n  replicas: x\n  8080: y\n"
    found = problems(text, tmp_path)
    assert [one.partition(": ")[::2] for one in found] == [
        ("4", "Deployment: spec.selector: is missing"),
        ("4", "Deployment: spec.template: is missing"),
        ("5", "Deployment: spec.replicas: = x: must be a whole number"),
        ("6", "Deployment: spec[8080]: unknown field; the nearest known one is `template`"),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no object"),
        ("# nothing\n---\n", "holds no object"),
        ("a: [1", "cannot be read as YAML"),
        ("a: \xff", "cannot be read as YAML"),
    ],
)
def test_a_file_without_manifests_is_refused(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert main([str(path)]) == 2
    assert told in capsys.readouterr().err
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml: cannot be read" in capsys.readouterr().err
    assert main([str(path), str(JOB_FILE), str(tmp_path)]) == 2
    assert "2 problems in 3 files" in capsys.readouterr().err


def test_the_command_says_what_it_checked_against(tmp_path: Path) -> None:
    good = subprocess.run(
        [ROOT / "cluster" / "validate", *FILES], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == f"{len(FILES)} files: valid against KubeRay 1.7.0.\n"
    text, line = changed(JOB, "  backoffLimit:", "  backofLimit:")
    (tmp_path / "job.yaml").write_text(text)
    bad = subprocess.run(
        [ROOT / "cluster" / "validate", "job.yaml"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    place = f"job.yaml:{line}: RayJob rexrag-train: spec.backofLimit"
    told = f"{place}: unknown field; the nearest known one is `backoffLimit`"
    assert bad.stderr == f"{told}\n1 problem in 1 file.\n"


def test_crds_of_ones_own_take_the_place_of_the_shipped_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"type": "object", "properties": {"newField": {"type": "integer"}}}
    whole = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    version = {"name": "v2", "served": True, "schema": {"openAPIV3Schema": whole}}
    names = {"kind": "RayCluster"}
    crd = {"kind": "CustomResourceDefinition", "spec": {"group": "ray.io", "names": names, "versions": [version]}}
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "rayclusters.yaml").write_text(yaml.safe_dump(crd))
    words = ["--crds", str(tmp_path / "crds")]
    mine = tmp_path / "mine.json"
    mine.write_text(
        json.dumps({"apiVersion": "ray.io/v2", "kind": "RayCluster", "metadata": {}, "spec": {"newField": 1}})
    )
    assert main([str(mine), *words]) == 0
    assert f"valid against the CRDs of {tmp_path / 'crds'}" in capsys.readouterr().out
    mine.write_text(mine.read_text().replace("newField", "newfield"))
    assert main([str(mine), *words]) == 2
    assert "spec.newfield: unknown field; the nearest known one is `newField`" in capsys.readouterr().err
    assert main([str(KUBERAY / "base" / "raycluster.yaml"), *words]) == 2
    assert "apiVersion ray.io/v1 has no schema" in capsys.readouterr().err
    assert main([str(KUBERAY / "base" / "platform.yaml"), *words]) == 0
    assert main([str(mine), "--crds", str(tmp_path)]) == 2
    assert "no CustomResourceDefinition of ray.io" in capsys.readouterr().err
