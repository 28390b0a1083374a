from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rexrag.errors import ConfigError, Interrupted, RunFolderError
from rexrag.files import read_jsonl
from rexrag.recipe import load_recipe
from rexrag.run.identity import first_step_of, note_precision, origin_of
from rexrag.run.plan import Plan, open_run, plan_run
from rexrag.run_folder import RunFolder

RECIPE = """
[prepare]
model = "tiny"
world = "synthetic"
index = "bm25"
warmstart = true
[train]
steps = 10
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def plan(recipe: Path | None, *overrides: str, run_dir: Path | None = None, resume: str = "auto") -> Plan:
    return plan_run(recipe, overrides=overrides, run_dir=run_dir, resume=resume)


def train_to(plan: Plan, *steps: int, interrupt: bool = False) -> RunFolder:
    """Leaves a run folder as a training would that checkpoints after each of `steps`."""
    try:
        with open_run(plan) as request:
            (request.run.prepared / "world").mkdir(parents=True, exist_ok=True)
            (request.run.prepared / "index").mkdir(exist_ok=True)
            (request.run.prepared / "warmstart").mkdir(exist_ok=True)
            for name in ("train", "dev", "test"):
                (request.run.prepared / "world" / f"{name}.jsonl").touch()
            for step in steps:
                checkpoint = request.run.checkpoints / f"step-{step:06d}"
                checkpoint.mkdir()
                (checkpoint / "COMMIT").touch()
                with request.run.metrics.open("a") as file:
                    file.writelines(json.dumps({"step": one}) + "\n" for one in (step, step + 1))
                request.run.set_steps(step)
            if interrupt:
                raise Interrupted("stopped")
    except Interrupted:
        pass
    return request.run


def test_a_new_run_with_a_default_name(recipe: Path, tmp_path: Path) -> None:
    new = plan(recipe)
    assert new.root.parent == tmp_path / "runs"
    assert new.root.name.startswith("mine-2")
    assert not new.root.exists()
    with open_run(new) as request:
        assert (request.start_step, request.checkpoint, request.resumed) == (0, None, False)
        assert request.config.model.path == str(new.root / "prepared" / "warmstart")
        assert load_recipe(request.run.config).config == request.config
    assert (tmp_path / "runs" / "latest").resolve() == new.root


def test_latest_is_left_alone_by_folders_elsewhere(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "else" / "where"))
    assert not (tmp_path / "else" / "latest").is_symlink()


def test_resume_with_the_runs_own_settings(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root), 4, 8, interrupt=True)
    again = plan(None, run_dir=root)
    assert (again.is_new, again.start_step, again.checkpoint) == (False, 8, root / "checkpoints" / "step-000008")
    assert again.recipe.name == "mine"
    text = (root / "config.toml").read_text()
    with open_run(again) as request:
        assert request.resumed
        assert [line["step"] for line in read_jsonl(request.run.metrics)] == [4, 5, 8]
    assert (root / "config.toml").read_text() == text


def test_resume_before_the_first_checkpoint_begins_at_step_0(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), interrupt=True)
    again = plan(recipe, run_dir=tmp_path / "run")
    assert (again.is_new, again.start_step, again.checkpoint) == (False, 0, None)


def test_resume_survives_a_moved_run_folder(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), 4, interrupt=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    again = plan(None, run_dir=tmp_path / "moved")
    assert again.start_step == 4
    assert again.recipe.config.data.train == [tmp_path / "moved" / "prepared" / "world" / "train.jsonl"]


def test_what_may_change_on_resume_is_written_down(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root), 4, interrupt=True)
    words = ["train.steps=20", "train.checkpoint_every=5", "eval.every=2"]
    words += ["rollout.num_actors=3", "learner.micro_batch_tokens=64"]
    with open_run(plan(recipe, *words, run_dir=root)) as request:
        assert request.config.train.steps == 20
        assert request.config.learner.micro_batch_tokens == 64
    stored = load_recipe(root / "config.toml").config
    assert (stored.train.steps, stored.train.checkpoint_every, stored.eval.every) == (20, 5, 2)


def test_all_that_leaves_a_steps_meaning_alone_may_change(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root), 4, interrupt=True)
    words = ["rollout.threads_per_actor=2", "rollout.num_gpus=0.5", "rollout.episodes_per_actor=7", "learner.threads=3"]
    words += ["learner.num_gpus=1", "replay.lease_timeout_s=400", "replay.lease_deadline_s=4000", "replay.segment_mb=8"]
    words += ["retriever.timeout_s=20", "retriever.max_retries=2", "retriever.url=http://10.0.0.1:8000"]
    words += ["train.keep_checkpoints=9", "train.stall_timeout_s=60", "learner.max_bad_steps=9"]
    with open_run(plan(None, *words, run_dir=root)) as request:
        assert request.config.retriever.url == "http://10.0.0.1:8000"
        assert request.config.replay.segment_mb == 8


def with_files(tmp_path: Path) -> list[str]:
    (tmp_path / "hints.txt").write_text("think again\n")
    (tmp_path / "prompt.txt").write_text("Q: {question}")
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards" / "__init__.py").touch()
    (tmp_path / "my_rewards" / "strict.py").write_text("def reward(prediction, golds, row): return 1.0\n")
    return ["probe.hints=hints.txt", "env.prompt_file=prompt.txt", "reward.kind=my_rewards.strict:reward"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hints.txt", "probe.hints"),
        ("prompt.txt", "env.prompt_file"),
        ("my_rewards/strict.py", "reward.kind"),
    ],
)
def test_a_resume_with_another_content_of_a_named_file_is_refused(
    recipe: Path, tmp_path: Path, name: str, key: str
) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, *with_files(tmp_path), run_dir=root), 4, interrupt=True)
    assert plan(None, run_dir=root).start_step == 4
    (tmp_path / name).write_text((tmp_path / name).read_text() + "# other\n")
    with pytest.raises(ConfigError) as caught:
        plan(None, run_dir=root)
    assert f"{key} = {tmp_path / name}: its content is not what the run was begun with" in str(caught.value)
    assert str(caught.value).count("its content") == 1


def test_another_precision_on_other_hardware_is_told_once(recipe: Path, tmp_path: Path) -> None:
    with open_run(plan(recipe, run_dir=tmp_path / "run")) as request:
        assert note_precision(request.run, {"learner.autocast": "float32"}) == []
    run = RunFolder(tmp_path / "run")
    (told,) = note_precision(run, {"learner.autocast": "bfloat16"})
    assert told.startswith("learner.autocast is bfloat16 on this hardware, and was float32")
    assert note_precision(run, {"learner.autocast": "bfloat16"}) == []
    assert origin_of(run) == (None, 0)


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(recipe: Path) -> None:
    plans = [plan(recipe) for _ in range(3)]
    roots = [train_to(one).root for one in plans]
    assert len(set(roots)) == 3
    for root in roots:
        assert load_recipe(root / "config.toml").config.model.path == str(root / "prepared" / "warmstart")


def test_a_fork_that_is_resumed_before_its_first_checkpoint_begins_where_it_began(recipe: Path, tmp_path: Path) -> None:
    root, fork = tmp_path / "run", tmp_path / "fork"
    train_to(plan(recipe, run_dir=root), 4, 8, interrupt=True)
    older = root / "checkpoints" / "step-000004"
    train_to(plan(None, resume=str(older), run_dir=fork), interrupt=True)
    again = plan(None, run_dir=fork)
    assert (again.is_new, again.start_step, again.checkpoint) == (False, 4, older)
    with open_run(again) as request:
        assert (request.start_step, request.resumed) == (4, True)
        assert first_step_of(request.run) == 4, "no log is missed of steps that another run did"
    (older / "COMMIT").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        plan(None, run_dir=fork)
    own = fork / "checkpoints" / "step-000006"
    own.mkdir()
    (own / "COMMIT").touch()
    with open_run(plan(None, run_dir=fork)) as request:
        assert request.checkpoint == own, "where it began is needed no more"


def test_a_fork_keeps_what_is_trained_where_that_is_adapters(recipe: Path, tmp_path: Path) -> None:
    root, full = tmp_path / "run", tmp_path / "full"
    train_to(plan(recipe, "learner.lora=8", run_dir=root), 4, 8, interrupt=True)
    train_to(plan(recipe, run_dir=full), 4, 8, interrupt=True)
    older, other = (str(folder / "checkpoints" / "step-000004") for folder in (root, full))
    assert plan(None, "optimizer.learning_rate=1e-3", resume=older).recipe.config.learner.lora == 8
    for checkpoint, words, message in [
        (older, ["learner.lora=0"], "learner.lora = 0: the checkpoint's run has 8"),
        (older, ["learner.lora_alpha=8"], "learner.lora_alpha = 8: the checkpoint's run has 32"),
        (older, ["model.path=other"], "model.path = '.*other': the checkpoint's run has '.*warmstart'"),
        (other, ["learner.lora=8"], "learner.lora = 8: the checkpoint's run has 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan(None, *words, resume=checkpoint)
    assert plan(None, "model.path=other", resume=other).is_new
    with pytest.raises(ConfigError, match=r"learner\.lora = 16 .*: the run has 8"):
        plan(None, "learner.lora=16", run_dir=root)


def test_a_run_is_resumed_from_a_recipe_that_is_unpacked_elsewhere(tmp_path: Path) -> None:
    """As a job's working directory is: what lies beside the recipe is the same, its place is not."""
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        for name in ("train", "dev"):
            rows = [{"id": name, "question": "Who?", "golden_answers": ["He"]}]
            (tmp_path / place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / place / "hints.txt").write_text("<think> Look again.\n")
        (tmp_path / place / "mine.toml").write_text(
            f'[model]\npath = "{tmp_path}"\n[retriever]\nkind = "http"\nurl = "http://localhost:8000"\n'
            '[data]\ntrain = "train.jsonl"\ndev = "dev.jsonl"\n[probe]\nhints = "hints.txt"\n'
        )
    run = train_to(plan(tmp_path / "first" / "mine.toml", run_dir=tmp_path / "run"), 4, interrupt=True)
    shutil.rmtree(tmp_path / "first")
    again = tmp_path / "second" / "mine.toml"
    with open_run(plan(again, run_dir=run.root)) as request:
        assert request.start_step == 4
    assert load_recipe(run.config).config.data.train == [tmp_path / "second" / "train.jsonl"]
    (tmp_path / "second" / "dev.jsonl").write_text('{"id": "other", "question": "What?", "golden_answers": ["It"]}\n')
    (tmp_path / "second").rename(tmp_path / "third")
    with pytest.raises(ConfigError, match=r"data\.dev = .*third.*: the run has .*second"):
        plan(tmp_path / "third" / "mine.toml", run_dir=run.root)


def test_a_folder_in_the_place_of_the_link_to_the_newest_run_keeps_none_from_starting(
    recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    run = train_to(plan(recipe), 4)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", run.root.name]


def test_a_folder_that_cannot_go_does_not_hide_the_users_mistake(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: object, *, dir_fd: int | None = None) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "rmdir", busy)
    with pytest.raises(ConfigError, match="a bad row"), open_run(plan(recipe, run_dir=tmp_path / "run")):
        raise ConfigError("a bad row")


@pytest.mark.parametrize("word", ["train.seed=1", "probe.rate=0.25", "method=grpo", "train.groups_per_step=9"])
def test_other_changes_are_refused_by_name(recipe: Path, tmp_path: Path, word: str) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), 4, interrupt=True)
    with pytest.raises(ConfigError) as caught:
        plan(None, word, run_dir=tmp_path / "run")
    changed = {"method=grpo": "probe.rate"}.get(word, word.partition("=")[0])
    assert f"{changed} = " in str(caught.value)
    assert "[--set]" in str(caught.value) or "method grpo" in str(caught.value)


def test_a_finished_run_has_nothing_to_do_until_steps_grow(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), 5, 10)
    assert plan(None, run_dir=tmp_path / "run").finished
    more = plan(None, "train.steps=12", run_dir=tmp_path / "run")
    assert not more.finished
    assert more.start_step == 10
    with pytest.raises(ConfigError, match="must be at least 10"):
        plan(None, "train.steps=8", run_dir=tmp_path / "run")


def test_all_steps_done_but_not_ended_is_not_finished(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), 10, interrupt=True)
    again = plan(None, run_dir=tmp_path / "run")
    assert (again.finished, again.start_step) == (False, 10)


def test_never_refuses_a_run_that_exists(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root, resume="never"))
    with pytest.raises(RunFolderError, match="exists"):
        plan(recipe, run_dir=root, resume="never")


def test_an_older_checkpoint_begins_a_new_run(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root), 4, 8, interrupt=True)
    older = root / "checkpoints" / "step-000004"
    fork = plan(None, "optimizer.learning_rate=1e-7", resume=str(older))
    assert (fork.is_new, fork.start_step, fork.checkpoint) == (True, 4, older)
    assert fork.root != root
    with open_run(fork) as request:
        assert not request.resumed
        assert request.config.optimizer.learning_rate == 1e-7
        assert request.config.prepare.model is None
        assert request.config.data.train == [root / "prepared" / "world" / "train.jsonl"]
        assert request.run.record().steps == 4
    with pytest.raises(RunFolderError, match="exists"):
        plan(None, resume=str(older), run_dir=root)
    with pytest.raises(ConfigError, match="leave"):
        plan(recipe, resume=str(older))


def test_the_newest_checkpoint_goes_on_with_its_run_unless_a_new_folder_is_named(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    train_to(plan(recipe, run_dir=root), 4, 8, interrupt=True)
    newest = str(root / "checkpoints" / "step-000008")
    assert not plan(None, resume=newest).is_new
    assert not plan(None, resume=newest, run_dir=Path("run")).is_new
    assert plan(None, resume=newest, run_dir=tmp_path / "new").is_new


def test_words_that_are_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="auto, never, or a checkpoint"):
        plan(None, resume="always")
    train_to(plan(recipe, run_dir=tmp_path / "run"), 4, interrupt=True)
    (tmp_path / "run" / "checkpoints" / "step-000006").mkdir()
    with pytest.raises(RunFolderError, match="no committed checkpoint; the run has step-000004"):
        plan(None, resume=str(tmp_path / "run" / "checkpoints" / "step-000006"))


def test_a_run_that_went_on_meanwhile_is_noticed(recipe: Path, tmp_path: Path) -> None:
    train_to(plan(recipe, run_dir=tmp_path / "run"), 4, interrupt=True)
    early = plan(None, run_dir=tmp_path / "run")
    train_to(plan(None, run_dir=tmp_path / "run"), 8, interrupt=True)
    with pytest.raises(RunFolderError, match="has gone on meanwhile"), open_run(early):
        pass


@pytest.mark.parametrize("run_dir", [None, Path("runs/first")])
def test_a_job_on_a_cluster_must_name_a_lasting_run_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: Path | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError) as caught:
        plan(recipe, run_dir=run_dir)
    assert f"--run-dir = {run_dir or '(not given)'}: " in str(caught.value)
    assert "must be an absolute path" in str(caught.value)
    assert "10.0.0.1:6379" in str(caught.value)
    assert plan(recipe, run_dir=tmp_path / "run").root == tmp_path / "run"
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert plan(recipe, run_dir=run_dir).is_new
