from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import rexrag.run_folder
from rexrag.errors import Interrupted, ModelError, RunFailure, RunFolderError
from rexrag.files import read_jsonl
from rexrag.run.plan import link_latest
from rexrag.run_folder import (
    RunFolder,
    claim,
    new_run_path,
    resolve_model_or_run,
    run_of,
)


def make_run(root: Path) -> RunFolder:
    return RunFolder.create(root, recipe="mine", seed=3, config="")


def commit(run: RunFolder, step: int) -> Path:
    folder = run.checkpoints / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "COMMIT").write_text("{}")
    return folder


def append(path: Path, *lines: Mapping[str, object] | str) -> None:
    with path.open("a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert RunFolder.is_run(run.root)
    with run:
        assert run.record().status == "running"
        assert run.record().ended is None
        run.set_steps(4)
    record = run.record()
    assert (record.status, record.steps, record.seed, record.recipe) == ("finished", 4, 3, "mine")
    assert record.ended is not None
    assert record.versions["torch"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Interrupted("x"), "interrupted"), (KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(type(error)), run:
        raise error
    assert run.record().status == status


def test_each_start_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    seen = []
    for _ in range(3):
        with run:
            seen.append(run.record().starts)
    assert seen == [1, 2, 3]


def test_the_second_user_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with run, pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"), RunFolder(run.root):
        pass
    with RunFolder(run.root):
        pass


def test_the_lock_goes_away_with_a_killed_holder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = "import sys; from rexrag.run_folder import RunFolder; from pathlib import Path\n"
    code += "RunFolder(Path(sys.argv[1])).__enter__(); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"process {holder.pid}"), run:
            pass
        holder.kill()
    assert run.record().status == "running"
    with run:
        assert run.record().starts == 2


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        make_run(tmp_path)
    with pytest.raises(RunFolderError, match="cannot be made"):
        make_run(tmp_path / "file")


def test_a_lock_of_somebody_else_in_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        make_run(tmp_path)
    assert (tmp_path / "lock").read_text() == "mine"


def test_what_a_run_begins_with_is_there_before_it_is_one(tmp_path: Path) -> None:
    def begin(run: RunFolder) -> None:
        assert not (run.root / "run.json").exists()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        RunFolder.create(tmp_path / "run", recipe="mine", seed=0, config="", begin=begin)
    assert not RunFolder.is_run(tmp_path / "run")
    with make_run(tmp_path / "run") as run:
        assert run.record().starts == 1


def test_a_start_that_died_before_run_json_leaves_a_folder_that_can_be_begun(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole").root
    for missing in (["run.json"], ["run.json", "config.toml", "buffer"], ["run.json", "tensorboard", "lock"]):
        root = tmp_path / "-".join(missing)
        shutil.copytree(whole, root)
        (root / ".config.toml.1-ab.tmp").touch()
        for name in missing:
            (root / name).rmdir() if (root / name).is_dir() else (root / name).unlink()
        with make_run(root) as run:
            assert run.record().starts == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.tmp").touch()
    with pytest.raises(RunFolderError, match="not empty and holds no run"):
        make_run(tmp_path / "mine")
    (whole / "run.json").unlink()
    (whole / "buffer" / "segment-000001.log").touch()
    with pytest.raises(RunFolderError, match="not empty and holds no run"):
        make_run(whole)


def test_two_that_begin_the_same_folder_do_not_share_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="was begun meanwhile"):
        make_run(tmp_path / "run")
    assert claim(tmp_path / "runs" / "mine")
    assert not claim(tmp_path / "runs" / "mine")


def test_a_full_disk_does_not_hide_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")

    def refuse(path: Path, data: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(RunFailure, match="the cause"), run:
        monkeypatch.setattr(rexrag.run_folder, "write_atomic", refuse)
        raise RunFailure("the cause")
    assert run.record().status == "failed"
    monkeypatch.setattr(RunFolder, "_write_fields", lambda self, fields: refuse(self.root / "run.json", ""))
    with pytest.raises(RunFailure, match="the cause"):
        run._lock()
        try:
            raise RunFailure("the cause")
        except RunFailure as error:
            run.__exit__(type(error), error, None)
            raise
    with pytest.raises(OSError, match=r"No space left.*run\.json"), RunFolder(run.root):
        pass


def test_another_format_or_a_broken_record_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run.root / "run.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(RunFolderError, match="format 99 is not this version's 1"):
        run.record()
    path.write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        run.record()


def test_later_lines_are_cut_and_kept_as_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    append(run.metrics, {"step": 1}, {"step": 2}, {"step": 3}, '{"step": 4, "torn')
    append(run.eval, {"split": "test", "step": 0}, {"split": "dev", "step": 2})
    run.cut_after(2)
    assert [line["step"] for line in read_jsonl(run.metrics)] == [1, 2]
    lost = (run.root / "metrics.lost.jsonl").read_text().splitlines()
    assert lost == ['{"step": 3}', '{"step": 4, "torn']
    assert len(read_jsonl(run.eval)) == 2
    assert not (run.root / "eval.lost.jsonl").exists()
    run.cut_after(0)
    assert read_jsonl(run.metrics) == []
    assert len((run.root / "metrics.lost.jsonl").read_text().splitlines()) == 4


def test_separators_inside_a_line_part_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = "shown \u2028 to \u2029 the \x85 model"
    lines = [json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n" for step in (1, 2, 3)]
    run.samples.write_text("".join(lines), encoding="utf-8")
    run.cut_after(2)
    assert read_jsonl(run.samples) == [{"step": 1, "text": text}, {"step": 2, "text": text}]
    assert read_jsonl(run.root / "samples.lost.jsonl") == [{"step": 3, "text": text}]


def test_what_is_evaluated_is_known_but_for_a_torn_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert run.evaluated(0) == frozenset()
    append(run.eval, {"split": "test", "step": 0}, {"split": "dev", "step": 0}, '{"split": "dev", "step": 2')
    assert run.evaluated(0) == {"test", "dev"}
    assert run.evaluated(2) == frozenset()


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    commit(run, 20)
    commit(run, 4)
    (run.checkpoints / "step-000040").mkdir()
    (run.checkpoints / "step-junk").mkdir()
    assert list(run.committed_checkpoints()) == [4, 20]


def test_best_is_by_dev_among_what_is_there_else_the_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        run.best_checkpoint()
    for step in (4, 8, 12):
        commit(run, step)
    assert run.best_checkpoint().name == "step-000012"
    append(run.eval, {"split": "test", "step": 12, "em": 1.0})
    append(run.eval, {"split": "dev", "step": 0, "em": 0.9, "n": 9}, {"split": "dev", "step": 4, "em": 0.5, "n": 9})
    append(run.eval, {"split": "dev", "step": 8, "em": 0.5, "n": 9}, {"split": "dev", "step": 12, "em": 0.4, "n": 9})
    assert run.best_checkpoint().name == "step-000008"
    commit(run, 16)
    append(run.eval, {"split": "dev", "step": 16, "em": 0.3, "n": 200})
    assert run.best_checkpoint().name == "step-000016", "of other questions than before"


def test_names_of_models_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "a")
    folder = commit(run, 3)
    assert resolve_model_or_run("runs/a") == folder
    assert resolve_model_or_run(str(folder)) == folder
    (tmp_path / "m.gguf").touch()
    assert resolve_model_or_run("m.gguf") == Path("m.gguf")
    assert resolve_model_or_run("owner/name") == Path("owner/name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither a model folder"):
        resolve_model_or_run("empty")
    for name in ("runs/nope", "./owner/name", "nope", "/a/b"):
        with pytest.raises(ModelError, match="does not exist"):
            resolve_model_or_run(name)
    assert [found.root if (found := run_of(path)) else None for path in (run.root, folder, tmp_path / "empty")] == [
        run.root,
        run.root,
        None,
    ]


def test_new_names_are_free_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    first = make_run(new_run_path("mine", parent=tmp_path)).root
    link_latest(first)
    second = make_run(new_run_path("mine", parent=tmp_path)).root
    assert first != second
    link_latest(second)
    assert (tmp_path / "latest").resolve() == second
    assert str((tmp_path / "latest").readlink()) == second.name
