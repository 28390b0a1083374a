"""The `rexrag` command: parses, calls, prints. Heavy parts are imported by the commands that need them.

Exit status: 0 done, 2 the user's mistake, 1 failure of the run, 130 interrupted after a clean checkpoint.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer
from rich.console import Console

from rexrag.commands import cluster, control
from rexrag.commands.cluster import SetOption
from rexrag.commands.index import index_app
from rexrag.commands.serve import serve_index
from rexrag.config import Config
from rexrag.errors import ConfigError, DataError, Interrupted, RexragError, UserError, counted
from rexrag.files import NO_ROOM
from rexrag.processes import give_way, num_cores
from rexrag.reporting.trace import coloured_trace, printable
from rexrag.sections import MAX_SEED

if TYPE_CHECKING:
    from rexrag.data.check import CheckReport

app = typer.Typer(
    name="rexrag",
    help="Train agentic search policies with REX-RAG.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data files.")
app.add_typer(data_app, name="data")
index_app.command("serve")(serve_index)
app.add_typer(index_app, name="index")

SHOWN_PROBLEMS = 20

STDOUT = Console(highlight=False, emoji=False, soft_wrap=True, markup=False)

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="Model folder, GGUF file, hub id, or run folder.")
]
IndexOption = Annotated[str, typer.Option("--index", metavar="DIR|URL", help="Index folder, or URL of a server.")]
TokenOption = Annotated[
    Path | None, typer.Option("--token-file", metavar="F", help="Bearer token of the server at --index.")
]
EncoderOption = Annotated[
    Path | None, typer.Option("--encoder", metavar="DIR", help="Where the encoder of the dense index is now.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=MAX_SEED)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


class WorldName(StrEnum):
    """Worlds that can be written."""

    GEO = "geo"
    SYNTHETIC = "synthetic"


def main() -> None:
    """Entry point of the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8, as on stderr
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        app()
    except UserError as error:
        _leave(f"error: {error}", status=2)
    except Interrupted as error:
        _leave(f"interrupted: {error}", status=130)
    except RexragError as error:
        _leave(f"failed: {error}", status=1)
    except BrokenPipeError:
        raise SystemExit(1) from None  # whoever read our output has gone
    except OSError as error:
        _leave(*_explained(error))


_REMEDIES = {
    errno.ENOENT: "name an existing one",
    errno.EACCES: "make it accessible, or name another",
    errno.EPERM: "make it accessible, or name another",
    errno.EROFS: "name a place that can be written to",
    errno.ENOTDIR: "a part of it is a file; name another",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "name another",
    errno.ENOTEMPTY: "name another",
    errno.ENAMETOOLONG: "name a shorter one",
}


def _explained(error: OSError) -> tuple[str, int]:
    """What to say of an error of the operating system, and the exit status."""
    place = error.filename2 or error.filename
    reason = error.strerror or str(error)
    said = reason if place is None else f"{place}: {reason}"
    if error.errno in NO_ROOM:
        return f"failed: {said}; free space, and give the command again", 1
    if place is not None and error.errno in _REMEDIES:
        return f"error: {said}; {_REMEDIES[error.errno]}", 2
    return f"failed: {said}; check the device and the network, and give the command again", 1


def _leave(message: str, status: int) -> NoReturn:
    # Words of the command line that are no UTF-8 come as lone surrogates, which no terminal prints.
    printable = message.encode("utf-8", "backslashreplace").decode("utf-8")
    Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(printable, markup=False)
    raise SystemExit(status)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        STDOUT.print(metadata.version("rexrag"))
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.toml]", help="Without one: the quick start.")
    ] = None,
    overrides: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder; an existing run is resumed.")] = None,
    resume: Annotated[str, typer.Option(metavar="auto|never|CHECKPOINT", help="Where to go on.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings with their sources.")] = False,
) -> None:
    """Train a policy, or go on with a run."""
    from rexrag.recipe import resolved_toml
    from rexrag.run.plan import open_run, plan_run

    plan = plan_run(recipe, overrides=overrides or [], run_dir=run_dir, resume=resume)
    if dry_run:
        STDOUT.print(resolved_toml(plan.recipe, base=plan.root), end="")
        _print_layout(plan.recipe.config)
        return
    if plan.finished:
        STDOUT.print(f"run {plan.root} is finished: {counted(plan.start_step, 'step')}; raise train.steps to go on.")
        return
    from rexrag.reporting.final_report import print_report
    from rexrag.reporting.log_file import log_to
    from rexrag.reporting.terminal import Progress
    from rexrag.run.train import check_startable
    from rexrag.run.train import train as run_training

    check_startable(plan.recipe.config)
    with open_run(plan) as request, log_to(request.run.log), Progress() as progress:
        progress.note(f"run folder: {request.run.root}")
        progress.note(f"TensorBoard: tensorboard --logdir {request.run.tensorboard}")
        run_training(request, progress=progress)
    print_report(request.run, console=Console(highlight=False, emoji=False))


def _print_layout(config: Config) -> None:
    """Which part gets which share of this machine, as comments of the recipe; what a cluster has only Ray knows."""
    import torch

    from rexrag.run.cluster import cluster_address
    from rexrag.run.engine_choice import describe_engine
    from rexrag.run.layout import describe_layout, plan_machine

    if cluster_address() is not None:
        return
    cores, gpus = num_cores(), torch.cuda.device_count()
    try:
        layout = plan_machine(config, num_cores=cores, num_gpus=gpus)
        lines = [*describe_layout(layout), describe_engine(config)]
    except ConfigError as error:  # of this machine, not of the recipe: it may be meant for a cluster
        lines = [f"it would not start: {error}"]
    STDOUT.print(f"\n# On this machine, with {counted(cores, 'core')} and {counted(gpus, 'GPU')}:")
    for line in lines:
        STDOUT.print(f"# {line}")


@app.command()
def warmstart(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, GGUF file, or hub id.")],
    demonstrations: Annotated[Path, typer.Option(metavar="F", help="Weighted demonstrations (jsonl).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model; must not exist.")],
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE.toml", help="Take its prompt, and the settings of its [prepare].")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Start a model with supervision on weighted demonstrations."""
    from rexrag.preparation.prepare import warm_start_as
    from rexrag.preparation.warmstart import WarmstartProgress
    from rexrag.recipe import load_recipe
    from rexrag.reporting.terminal import Progress

    config = Config() if recipe is None else load_recipe(recipe).config

    with Progress() as progress:
        progress.stage("warm start", total=1.0)

        def show(state: WarmstartProgress) -> None:
            progress.advance_to(state.update / state.num_updates)

        result = warm_start_as(config, model, demonstrations=demonstrations, out=out, seed=seed, progress=show)
    STDOUT.print(
        f"{result.folder}: {counted(result.num_demonstrations, 'demonstration')}, last loss {result.losses[-1]:.3f}"
    )
    if result.depth is not None:
        STDOUT.print(f"the dead end: {result.depth}")


@app.command()
def world(
    kind: Annotated[WorldName, typer.Argument(help="Real geography, or invented facts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files; must be empty or absent.")],
    seed: SeedOption = 0,
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="DIAL=N", help="Set a dial of the world; may be repeated.")
    ] = None,
) -> None:
    """Write a world: corpus, questions in three parts, and demonstrations."""
    from rexrag.worlds.write import write_world

    files = write_world(kind.value, out, seed=seed, size=_parse_dials(size or []))
    for name, count in files.counts.items():
        STDOUT.print(f"{count:>7} {name}")
    STDOUT.print(f"written to {files.folder}")


def _parse_dials(words: list[str]) -> dict[str, float]:
    dials: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            dials[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"--size {word}: must be DIAL=NUMBER, such as --size train=500.") from None
    return dials


@data_app.command("check")
def check_data(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Questions, corpus or demonstrations.")],
    as_json: JsonOption = False,
) -> None:
    """Count the rows of a data file, and list what is wrong with them."""
    from rexrag.data.check import check_file

    report = check_file(file)
    if as_json:
        STDOUT.print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        STDOUT.print(
            f"{report.path}: {report.kind}, {counted(report.rows, 'row')}, {counted(report.num_problems, 'problem')}"
        )
        for title, counts in (("source", report.by_source), ("hops", report.by_hops)):
            for name, count in counts.items():
                STDOUT.print(f"{count:>7} {title} {'unknown' if name is None else printable(str(name))}")
        for note in report.notes:
            STDOUT.print(f"note: {note}")
    if report.problems:
        raise DataError(_problem_list(report, with_rows=not as_json))


def _problem_list(report: CheckReport, *, with_rows: bool) -> str:
    """The heading and, unless they are on stdout already, the first problems, with the number of the others."""
    if len(report.problems) == 1 and report.problems[0].number is None:
        return str(report.problems[0])
    lines = [f"{report.path}: {counted(report.num_problems, 'problem')}; correct these rows."]
    if with_rows:
        lines += map(str, report.problems[:SHOWN_PROBLEMS])
        if report.num_problems > SHOWN_PROBLEMS:
            lines.append(f"and {report.num_problems - SHOWN_PROBLEMS} more (--json lists {len(report.problems)})")
    return "\n".join(lines)


@app.command("eval")
def evaluate(
    model: ModelArg,
    questions: Annotated[list[Path], typer.Option(metavar="F", help="Questions; may be repeated.")],
    index: IndexOption,
    token_file: TokenOption = None,
    encoder: EncoderOption = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="F.toml", help="Prompt and limits as in this recipe; default: the run's.")
    ] = None,
    overrides: SetOption = None,
    out: Annotated[Path | None, typer.Option(metavar="F.json", help="Write the figures to a file too.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="F.jsonl", help="Write each question's trace and scores, as they come.")
    ] = None,
    as_json: JsonOption = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count and skip bad rows of the questions.")
    ] = False,
) -> None:
    """Evaluate a model, greedily."""
    give_way()
    from rexrag.commands.standalone import evaluate as run_episodes
    from rexrag.commands.standalone import named_step, settings_for
    from rexrag.data.questions import load_questions
    from rexrag.files import write_atomic
    from rexrag.reporting.evaluation import score_line, summarize
    from rexrag.reporting.terminal import Progress
    from rexrag.types import EpisodeScore

    for option, path in (("--out", out), ("--predictions", predictions)):
        _require_writable(path, option=option)
    loaded = load_questions(list(questions), skip_bad_rows=skip_bad_rows, skip_by="add --skip-bad-rows")
    asked = loaded.questions
    for note in loaded.notes:
        Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(f"note: {note}", markup=False)
    path, settings = settings_for(
        model, index=index, token_file=token_file, encoder=encoder, recipe=recipe, overrides=overrides or []
    )
    step = named_step(path)
    started = time.monotonic()
    scores: list[EpisodeScore] = []
    with Progress() as progress, _kept_as_they_come(predictions) as kept:
        progress.stage(f"evaluating {path}", total=len(asked))

        def show(score: EpisodeScore) -> None:
            scores.append(score)
            if kept is not None:
                kept.write(json.dumps(score_line(score), ensure_ascii=False) + "\n")
            progress.advance_to(len(scores))

        report = summarize(run_episodes(settings, questions=asked, step=step, on_score=show))
    line = report.to_line(split="test", step=step, version=step, seconds=time.monotonic() - started)
    text = json.dumps(line, ensure_ascii=False)
    STDOUT.print(text if as_json else _eval_table(line))
    if out is not None:
        write_atomic(out, f"{text}\n")


def _kept_as_they_come(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """A file of lines that are there as soon as they are written; nothing where there is no path."""
    return nullcontext() if path is None else path.open("w", encoding="utf-8", buffering=1)


def _require_writable(path: Path | None, *, option: str) -> None:
    """Refuse a file that could not be written after the hours that its figures take."""
    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError(
            f"{option} {path}: cannot be written there; name a file in a folder that exists and is writable"
        )


def _eval_table(line: dict[str, object]) -> str:
    rows = [
        f"{counted(int(str(line['n'])), 'question')}",
        f"EM  {line['em']:.3f} [{line['em_low']:.3f}, {line['em_high']:.3f}]",
    ]
    rows.append(f"F1  {line['f1']:.3f}")
    for title, key in (("source", "by_source"), ("hops", "by_hops")):
        part = line[key]
        assert isinstance(part, dict)
        rows += [f"  {title} {printable(name)}: EM {row['em']:.3f}, n = {row['n']:.0f}" for name, row in part.items()]
        if key == "by_source" and len(part) > 1:
            rows.append(f"  mean over sources: EM {line['macro_em']:.3f}")
    return "\n".join(rows)


@app.command()
def ask(
    model: ModelArg,
    question: Annotated[str, typer.Argument(metavar='"question"', help="The question.")],
    index: IndexOption,
    token_file: TokenOption = None,
    encoder: EncoderOption = None,
) -> None:
    """Ask one question, and see how the model gets to its answer."""
    give_way()
    from rexrag.commands.standalone import ask as ask_model

    trace = ask_model(model, question=question, index=index, token_file=token_file, encoder=encoder)
    Console(highlight=False, emoji=False, soft_wrap=True).print(coloured_trace(trace))


cluster.register(app)
control.register(app)
