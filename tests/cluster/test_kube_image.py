"""The image's recipe, read and not built: its versions, its user, and that what it copies is there."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.layout import SMALL, USER_ID
from cluster.manifests import KUBERAY
from cluster.pods import HOME

ROOT = KUBERAY.parent.parent
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its words; continued lines are one."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in whole.splitlines() if line.strip()]


def copied() -> list[str]:
    """What is copied from the checkout."""
    words = [text.split() for name, text in instructions() if name == "COPY"]
    return [source for one in words if not one[0].startswith("--from") for source in one[:-1]]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_base_is_one_version_of_a_python_that_rexrag_runs_on() -> None:
    (base,) = [text.partition("=")[2] for name, text in instructions() if name == "ARG" and text.startswith("PYTHON_")]
    image, _, tag = base.partition(":")
    assert image == "python"
    version = re.match(r"(\d+\.\d+)\.\d+-slim-\w+$", tag)
    assert version
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version[1])
    assert {text.split()[0] for name, text in instructions() if name == "FROM"} == {"${PYTHON_IMAGE}"}


def test_it_ends_as_the_user_of_the_manifests() -> None:
    users = [text for name, text in instructions() if name == "USER"]
    assert users == [f"{USER_ID}:{USER_ID}"]
    assert ("WORKDIR", HOME) in instructions()
    last = max(index for index, (name, _) in enumerate(instructions()) if name in ("RUN", "COPY"))
    assert last < [name for name, _ in instructions()].index("USER"), "what is made belongs to root"


def test_pip_installs_pinned_versions_and_keeps_no_cache() -> None:
    (command,) = [text for name, text in instructions() if name == "RUN" and "pip install" in text]
    assert "--no-cache-dir" in command
    assert '--constraint "${CONSTRAINTS}"' in command
    defaults = dict(text.partition("=")[::2] for name, text in instructions() if name == "ARG" and "=" in text)
    assert (ROOT / defaults["CONSTRAINTS"]).exists()
    assert defaults["EXTRAS"] in PROJECT["optional-dependencies"]
    assert "gpu" in PROJECT["optional-dependencies"]


def test_what_it_copies_is_there_and_not_ignored() -> None:
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), source
    assert set(kept) == set(copied()), "nothing else is sent to the build"


def test_the_recipe_of_the_small_cluster_is_in_it() -> None:
    assert ("COPY", "recipes /opt/rexrag/recipes") in instructions()
    assert (ROOT / Path(SMALL.recipe).relative_to("/opt/rexrag")).exists()


@pytest.mark.parametrize(("file", "extra"), [("constraints.txt", "retrieval"), ("cluster/constraints-gpu.txt", "gpu")])
def test_the_versions_are_those_that_rexrag_asks_for(file: str, extra: str) -> None:
    versions = pins(ROOT / file)
    for need in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]:
        requirement = Requirement(need)
        assert requirement.specifier.contains(versions[requirement.name]), need
