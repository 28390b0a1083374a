"""Commands for runs on a cluster: `submit`, `plan`, `board`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rexrag.commands.token import use_token
from rexrag.errors import ConfigError, RunFolderError
from rexrag.processes import num_cores

RecipeArg = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="Recipe to train.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Set a key of the recipe; may be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("submit")(submit)
    app.command("plan")(plan)
    app.command("board")(board)


def submit(
    recipe: RecipeArg,
    run_dir: Annotated[Path, typer.Option(metavar="DIR", help="Run folder: an absolute path on shared storage.")],
    overrides: SetOption = None,
    resume: Annotated[str | None, typer.Option(metavar="auto|never|CHECKPOINT", help="As of rexrag train.")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Job server; without it RAY_ADDRESS, else this machine's.")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to upload with the recipe in it; without it the recipe's own."),
    ] = None,
    stop_wait_s: Annotated[int, typer.Option(min=1, help="Seconds from a stop's SIGTERM to its SIGKILL.")] = 600,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")] = False,
) -> None:
    """Train as a job of a Ray cluster. The same command again goes on with the run."""
    use_token()
    from rexrag.run.submission import DEFAULT_ADDRESS, JobServer, plan_job

    words = [word for setting in overrides or [] for word in ("--set", setting)]
    words += [] if resume is None else ["--resume", resume]
    job = plan_job(recipe, run_dir=run_dir, words=words, working_dir=working_dir, stop_wait_s=stop_wait_s)
    server = JobServer(address or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS)
    server.submit(job)
    typer.echo(f"{job.job_id}: submitted; its run folder is {run_dir}")
    if not follow:
        typer.echo(f"follow it with: ray job logs --follow {job.job_id}")
        return
    try:
        status = server.follow(job.job_id)
    except KeyboardInterrupt:
        typer.echo(f"{job.job_id}: goes on; stop it with: ray job stop {job.job_id}", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(status)


def plan(
    recipe: RecipeArg,
    overrides: SetOption = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster; without it RAY_ADDRESS, else this machine.")
    ] = None,
) -> None:
    """What each part of a run computes with and reserves, and whether the cluster can hold it."""
    use_token()
    from rexrag.recipe import load_recipe
    from rexrag.run.layout import describe_layout, plan_cluster, plan_machine
    from rexrag.run.nodes import nodes_at

    config = load_recipe(recipe, overrides=overrides or []).config
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked is None:
        import torch

        layout = plan_machine(config, num_cores=num_cores(), num_gpus=torch.cuda.device_count())
    else:
        layout = plan_cluster(config, nodes=nodes_at(asked))
    for line in describe_layout(layout):
        typer.echo(line)


def board(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.")],
    host: Annotated[
        str, typer.Option(help="Where it listens; beyond loopback anyone who reaches it may look.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0: any free one.")] = 6006,
) -> None:
    """Show runs in TensorBoard, side by side."""
    from rexrag.run_folder import RunFolder

    found: dict[str, Path] = {}
    for path in runs:
        folders = [path] if RunFolder.is_run(path) else sorted(one for one in path.glob("*") if RunFolder.is_run(one))
        if not folders:
            raise RunFolderError(f"{path}: is no run folder and holds none; name one, such as runs/latest")
        for folder in folders:
            name = folder.resolve().name
            known = found.setdefault(name, folder)
            if known.resolve() != folder.resolve():
                raise ConfigError(f"{folder}: has the name of {known}; TensorBoard tells runs apart by theirs")
    logs = {name: str(RunFolder(folder).tensorboard) for name, folder in found.items()}
    if len(logs) == 1:
        where = ["--logdir", *logs.values()]
    elif odd := next((path for name, path in logs.items() if {",", ":"} & {*name, *path}), None):
        raise ConfigError(f"{odd}: TensorBoard cannot tell it apart, for its comma or colon; show it alone")
    else:
        where = ["--logdir_spec", ",".join(f"{name}:{path}" for name, path in logs.items())]
    words = [sys.executable, "-m", "tensorboard.main", *where, "--host", host, "--port", str(port)]
    os.execv(sys.executable, words)
