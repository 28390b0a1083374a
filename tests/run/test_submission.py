"""What of a user's folder goes to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rexrag.run.submission as submission
from rexrag.errors import ConfigError
from rexrag.run.submission import JobServer, plan_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text("")
    return tmp_path


def test_the_clusters_token_beside_the_recipe_stays_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: dict[str, Any] = {}

    class Client:
        def __init__(self, address: str) -> None:
            pass

        def delete_job(self, job_id: str) -> None:
            raise RuntimeError("no such job")

        def submit_job(self, **words: Any) -> str:  # noqa: ANN401
            submitted.update(words)
            return "job"

    monkeypatch.setattr(submission, "JobSubmissionClient", Client)
    monkeypatch.setattr(submission, "check_listens", lambda address: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "keys" / "token"))
    job = plan_job(folder / "recipe.toml", run_dir=Path("/shared/runs/a"), words=[], working_dir=None)
    JobServer("http://127.0.0.1:8265").submit(job)
    environment = submitted["runtime_env"]
    assert environment["working_dir"] == str(folder)
    assert {"/keys/token", "/.ray/", "/.ssh/"} <= set(environment["excludes"])
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere/token")
    JobServer("http://127.0.0.1:8265").submit(job)
    assert "token" not in " ".join(submitted["runtime_env"]["excludes"])


def test_a_whole_home_is_not_uploaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(ConfigError, match=r"all of .* would be uploaded with it"):
        plan_job(folder / "recipe.toml", run_dir=Path("/shared/runs/a"), words=[], working_dir=None)
