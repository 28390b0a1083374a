"""A run as a job of a Ray cluster: what is uploaded, under which id, and what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ray.job_submission import JobStatus, JobSubmissionClient

from rexrag.errors import ConfigError, RunFailure, first_line
from rexrag.run.cluster import check_listens
from rexrag.run.control_actor import run_name

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
STOP_WAIT_S: Final = 600
"""Seconds from a stop's SIGTERM to its SIGKILL: a step and a checkpoint fit into it. Ray's own default is 3."""
EXCLUDES: Final = ("/runs/", "/.venv/", "/.venv-vllm/", "/.git", "/site/", "/.ray/", "/.ssh/", "__pycache__")
_EXIT_OF_STOPPED: Final = 130


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is submitted. `working_dir`: uploaded; None: the recipe lies on shared storage."""

    job_id: str
    words: tuple[str, ...]
    working_dir: Path | None
    stop_wait_s: int

    @property
    def entrypoint(self) -> str:
        return shlex.join(("python", "-m", "rexrag", "train", *self.words))


def plan_job(
    recipe: Path, *, run_dir: Path, words: Sequence[str], working_dir: Path | None, stop_wait_s: int = STOP_WAIT_S
) -> Job:
    """The job that trains a recipe into a run folder.

    Args:
        recipe: a file here, which is uploaded with its folder, or an absolute path on shared storage.
        words: further words of `rexrag train`.
        working_dir: the folder to upload, which the recipe is in; None: the recipe's own.

    Raises:
        ConfigError: the run folder would not outlive the job, or the recipe would not be found.
    """
    if not run_dir.is_absolute():
        raise ConfigError(
            f"--run-dir = {run_dir}: must be an absolute path on storage that all nodes share and that outlives the "
            "job; name one, such as --run-dir /shared/runs/first"
        )
    if not recipe.is_file():
        if working_dir is not None or not recipe.is_absolute():
            raise ConfigError(f"RECIPE = {recipe}: no such file here; name one, or an absolute path on shared storage")
        named = recipe
    else:
        found = recipe.resolve()
        root = (working_dir or found.parent).resolve()
        if not found.is_relative_to(root):
            raise ConfigError(f"RECIPE = {recipe}: must be in --working-dir = {root}, which is what the cluster gets")
        if Path.home().resolve().is_relative_to(root):
            raise ConfigError(f"RECIPE = {recipe}: all of {root} would be uploaded with it; put it into a folder")
        named, working_dir = found.relative_to(root), root
    return Job(
        job_id=run_name(run_dir),
        words=(str(named), "--run-dir", str(run_dir), *words),
        working_dir=working_dir,
        stop_wait_s=stop_wait_s,
    )


def _token_in(folder: Path) -> list[str]:
    """The cluster's own token, where it lies in a folder that would be uploaded."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = None if not named else Path(named).resolve()
    return [f"/{path.relative_to(folder).as_posix()}"] if path is not None and path.is_relative_to(folder) else []


class JobServer:
    """The job server of a cluster.

    Raises:
        ConfigError: on making one: the address is none, or nobody listens there.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        parsed = urllib.parse.urlsplit(address)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ConfigError(
                f"--address = {address}: must be the URL of a job server, such as {DEFAULT_ADDRESS}, where a cluster's "
                "dashboard listens"
            )
        check_listens(f"{parsed.hostname}:{parsed.port or (443 if parsed.scheme == 'https' else 80)}")
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(
                f"--address = {address}: no job server that takes us ({first_line(error)}); is the token the "
                "cluster's (RAY_AUTH_TOKEN_PATH)?"
            ) from error

    def submit(self, job: Job) -> None:
        """Start a job; one of the same run that has ended makes room for it.

        Raises:
            ConfigError: the run's job goes on, or the upload is refused.
        """
        with contextlib.suppress(RuntimeError):  # Ray keeps one that goes on, and refuses the submission below
            self._client.delete_job(job.job_id)
        environment: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_wait_s)}}
        if job.working_dir is not None:
            excludes = [*EXCLUDES, *_token_in(job.working_dir)]
            environment |= {"working_dir": str(job.working_dir), "excludes": excludes}
        self._submit(job.entrypoint, job_id=job.job_id, environment=environment)

    def ask(self, words: Sequence[str]) -> int:
        """Run `rexrag WORDS` on the cluster, where a run can be found, and copy what it says; returns its exit status.

        Raises:
            ConfigError: the job is refused.
        """
        job_id = self._submit(shlex.join(("python", "-m", "rexrag", *words)))
        try:
            return self.follow(job_id)
        finally:
            with contextlib.suppress(RuntimeError):
                self._client.stop_job(job_id)
                self._client.delete_job(job_id)

    def follow(self, job_id: str) -> int:
        """Copy the job's log to stdout until it ends; returns its exit status.

        Raises:
            RunFailure: the job server went away.
        """
        try:
            asyncio.run(self._copy_log(job_id))
            info = self._client.get_job_info(job_id)
        except (ConnectionError, RuntimeError) as error:
            raise RunFailure(f"{job_id}: the job server went away ({first_line(error)}); the job may go on") from error
        if info.status == JobStatus.STOPPED:
            return _EXIT_OF_STOPPED
        if info.status == JobStatus.SUCCEEDED:
            return 0
        return info.driver_exit_code or 1

    def _submit(
        self, entrypoint: str, *, job_id: str | None = None, environment: dict[str, object] | None = None
    ) -> str:
        try:
            return self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment)
        except (RuntimeError, ValueError) as error:
            if "already exists" in str(error):
                raise ConfigError(
                    f"{job_id}: goes on already; follow it (ray job logs --follow {job_id}) or stop it "
                    f"(rexrag stop, or ray job stop {job_id}), then submit it again"
                ) from None
            raise ConfigError(f"--address = {self._address}: refuses the job: {first_line(error)}") from error

    async def _copy_log(self, job_id: str) -> None:
        async for text in self._client.tail_job_logs(job_id):
            sys.stdout.write(text)
            sys.stdout.flush()
