"""Commands for a run that goes on: `status`, `scale`, `stop`, from any machine that reaches its cluster."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import rexrag.metrics as keys
from rexrag.commands.token import use_token
from rexrag.errors import counted

if TYPE_CHECKING:
    from rexrag.run.remote_control import RemoteRun
    from rexrag.run.status import RunStatus

RunOption = Annotated[
    str | None, typer.Option("--run", metavar="NAME|DIR", help="Run folder or name; without it the only one there is.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT|URL", help="Ray cluster, or its job server; without it the one of the run."
    ),
]
WATCH_EVERY_S = 2.0
_SHOWN = (
    (keys.TARGET_EM, "EM of targets"),
    (keys.PROBE_EM, "EM of probes"),
    (keys.TIME_STEP, "seconds a step"),
    (keys.TIME_LEARNER_WAIT, "learner waited, s"),
    (keys.ROLLOUT_TOKENS_PER_S, "tokens/s"),
    (keys.STALENESS_MEAN, "age, steps"),
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("status")(status)
    app.command("scale")(scale)
    app.command("stop")(stop)


def status(
    run: RunOption = None,
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds.")] = False,
) -> None:
    """How a run that goes on is doing, and who waits for whom."""
    # The stdout of now: while a cluster is joined what is printed goes to stderr.
    console = Console(file=sys.stdout, highlight=False, emoji=False)
    with _found(run, address, "status", *(["--json"] if as_json else []), *(["--watch"] if watch else [])) as found:
        if as_json:
            while True:
                console.print_json(json.dumps(found.status().to_json()), indent=None)
                if not watch:
                    return
                time.sleep(WATCH_EVERY_S)
        if not watch:
            console.print(_shown(found.status()))
            return
        with Live(_shown(found.status()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_EVERY_S)
                live.update(_shown(found.status()), refresh=True)


def scale(
    actors: Annotated[int, typer.Option("--actors", min=1, metavar="N", help="Rollout actors to have.")],
    run: RunOption = None,
    address: AddressOption = None,
    now: Annotated[
        bool, typer.Option("--now", help="Actors that go give back what they have begun, instead of finishing it.")
    ] = False,
) -> None:
    """Have more or fewer rollout actors while a run goes on."""
    with _found(run, address, "scale", "--actors", str(actors), *(["--now"] if now else [])) as found:
        found.scale(actors, now=now)
    typer.echo(f"{found.name}: {counted(actors, 'rollout actor')} asked for; rexrag status shows them come and go")


def stop(run: RunOption = None, address: AddressOption = None) -> None:
    """End a run after the step that it is in, with a checkpoint."""
    with _found(run, address, "stop") as found:
        found.stop()
    typer.echo(f"{found.name}: asked to stop; it ends after a checkpoint of its last step")


@contextmanager
def _found(run: str | None, address: str | None, *words: str) -> Iterator[RemoteRun]:
    """The run that is meant. Behind a job server it is found from there, by the same command as a job.

    Args:
        words: the command and its options, but for which run is meant.
    """
    use_token()
    asked = address or os.environ.get("RAY_ADDRESS") or ""
    if asked.startswith(("http://", "https://")) and (address is not None or run is None or not Path(run).is_dir()):
        from rexrag.run.submission import JobServer

        raise typer.Exit(JobServer(asked).ask((*words, *(() if run is None else ("--run", run)))))
    from rexrag.run.remote_control import find_place, remote_run

    with remote_run(find_place(run, address=address)) as found:
        yield found


def _shown(told: RunStatus) -> RenderableType:
    head = [f"{told.name}  {told.stage}, step {told.step} of {told.num_steps}", told.run_folder]
    head += [f"EM on {split} {line['em']:.3f} at step {line['step']:.0f}" for split, line in told.evaluations.items()]
    if told.waiting is not None:
        head.append(f"{told.waiting} ({told.waiting_s:.0f} s)")
    values = [(name, told.metrics.get(key)) for key, name in _SHOWN]
    head += [f"{name} {value:.3g}" for name, value in values if value is not None]
    if told.buffer is not None:
        head.append(
            "groups: " + ", ".join(f"{told.buffer[name]} {name}" for name in ("leased", "finished", "assigned"))
        )
    head.append(f"retriever: {told.retriever}; rollout actors wanted: {told.num_wanted}")
    table = Table("actor", "state", "node", "weights", "groups", "requests", "tokens/s", "age, s", box=None)
    for actor in told.actors:
        rate = "-" if actor.tokens_per_s is None else f"{actor.tokens_per_s:.0f}"
        version = "-" if actor.version is None else str(actor.version)
        counts = (str(actor.num_groups), str(actor.num_requests), rate, f"{actor.age_s:.0f}")
        table.add_row(actor.actor_id, actor.state, actor.node or "-", version, *counts)
    return Group(Text("\n".join(head)), table)
