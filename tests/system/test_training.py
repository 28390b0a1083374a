"""The main job on a real Ray: runs, resumes, survives, and leaves what it promises."""

from __future__ import annotations

import json
import shutil
import signal
import tomllib
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file
from system_runs import (
    TIMEOUT_S,
    assert_books_balance,
    child_of,
    num_steps,
    read_lines,
    run_rexrag,
    start_rexrag,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rexrag.metrics as keys
from rexrag.model.loading import load_model, load_tokenizer

pytestmark = pytest.mark.system

PROMISED = (
    keys.STEP, keys.VERSION, keys.TARGET_EM, keys.PROBE_EM, keys.TARGET_DEAD_END_RATE, keys.GROUP_RESCUED,
    keys.MIXTURE_ALPHA, keys.FILTER_RHO, keys.WEIGHT_MEAN, keys.WEIGHT_MAX, keys.WEIGHT_ESS_TARGET,
    keys.WEIGHT_ESS_PROBE, keys.STALENESS_MEAN, keys.STALENESS_MAX, keys.TIME_STEP, keys.TIME_LEARNER_WAIT,
    keys.ROLLOUT_TOKENS_PER_S,
)  # fmt: skip
TIMES_AND_RATES = {key for key in keys.DESCRIPTIONS if key.startswith(("time/", "engine/")) or key.endswith("_s")}
"""What depends on the clock: of an engine also in which step its switch to new weights was confirmed."""


SYNCHRONOUS = (
    "--set=replay.max_staleness=0",
    "--set=rollout.threads_per_actor=1",
    "--set=learner.threads=1",
    "--set=rollout.num_actors=1",
)
"""With no staleness and one thread a run is the same each time."""


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    run_rexrag("train", recipe, "--run-dir", run, *SYNCHRONOUS)
    return run


def test_metrics_of_every_step(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(PROMISED) <= set(line)
        assert set(map(keys.described, line)) <= set(keys.DESCRIPTIONS)
        assert line["staleness/max"] is not None
        assert line["staleness/max"] == 0


def test_evaluations_before_between_and_after(finished: Path) -> None:
    lines = [(str(line["split"]), line["step"], line["n"]) for line in read_lines(finished / "eval.jsonl")]
    assert lines == [("test", 0, 8), ("dev", 0, 8), ("dev", 2, 8), ("dev", 4, 8), ("test", 4, 8)]


def test_books_balance_and_all_groups_are_consumed(finished: Path) -> None:
    assert assert_books_balance(finished)["consumed"] == 4 * 8
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"


def test_checkpoint_is_a_model_folder(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-000004"
    load_model(folder, dtype="float32")
    load_tokenizer(folder)
    assert (folder / "COMMIT").exists()


def test_tensorboard_has_the_same_numbers(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    lines = read_lines(finished / "metrics.jsonl")
    scalars = [event.value for event in events.Scalars("target/em")]
    assert scalars == pytest.approx([line["target/em"] for line in lines])


def test_a_finished_run_says_so(finished: Path) -> None:
    run_rexrag("train", "--run-dir", finished)
    assert num_steps(finished) == 4


def test_a_run_that_is_cut_in_two_equals_one_that_is_not(recipe: Path, tmp_path: Path, finished: Path) -> None:
    halves = tmp_path / "halves"
    run_rexrag("train", recipe, "--run-dir", halves, *SYNCHRONOUS, "--set=train.steps=2")
    run_rexrag("train", "--run-dir", halves, "--set=train.steps=4")
    lines = zip(read_lines(finished / "metrics.jsonl"), read_lines(halves / "metrics.jsonl"), strict=True)
    for one, other in lines:
        assert {k: v for k, v in one.items() if k not in TIMES_AND_RATES} == {
            k: v for k, v in other.items() if k not in TIMES_AND_RATES
        }
    whole, cut = (load_file(run / "checkpoints" / "step-000004" / "model.safetensors") for run in (finished, halves))
    assert all((whole[name] == cut[name]).all() for name in whole)
    assert assert_books_balance(halves)["consumed"] == 4 * 8


def test_what_a_log_misses_is_told_everywhere_and_the_run_goes_on(recipe: Path, tmp_path: Path, finished: Path) -> None:
    """A log that does not reach up to its checkpoint, as the copy of a run that was going on has it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = run / "buffer" / "segment-000001.log"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    resumed = run_rexrag("train", "--run-dir", run, "--set=train.steps=5", "--set=eval.max_questions=1")
    assert "oken authentication" not in resumed
    assert "warning: the replay log does not say which groups step" in resumed
    books = assert_books_balance(run)
    assert "does not say which groups step" in str(books["damages"])
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert any(line["part"] == "buffer" and "does not say which groups" in line["message"] for line in lines)

    log.unlink(missing_ok=True)  # it is gone already if no group in it can be asked again
    train = Path(next(line for line in recipe.read_text().splitlines() if line.startswith("train =")).split('"')[1])
    kept = train.read_text()
    try:
        train.write_text('{"id": "1", "question": "q?", "golden_answers": ["a"]}\n')
        refused = run_rexrag("train", "--run-dir", run, "--set=train.steps=6", status=2)
    finally:
        train.write_text(kept)
    assert "other questions than the 1 given" in refused
    assert "starting Ray" not in refused


@pytest.mark.parametrize("part", ["ReplayActor", pytest.param("LearnerActor", marks=pytest.mark.slow)])
def test_a_run_whose_part_dies_ends_with_what_the_learner_has_if_it_lives(
    recipe: Path, tmp_path: Path, part: str
) -> None:
    """Before the first checkpoint; the deaths of all parts, with checkpoints, are those of test_chaos.py."""
    run = tmp_path / "run"
    words = ["train.steps=100000", "eval.every=0", "train.checkpoint_every=200"]
    process = start_rexrag("train", recipe, "--run-dir", run, *(f"--set={word}" for word in words))
    try:
        wait_for(lambda: num_steps(run) >= 3, process=process)
        (victim,) = child_of(process, title=f"ray::{part}")
        victim.kill()
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert "died" in errors
    saved = [int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir()]
    assert saved == ([num_steps(run)] if part == "ReplayActor" else [])
    end = sum(saved) + 1
    run_rexrag("train", "--run-dir", run, "--set", f"train.steps={end}")
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, end + 1))
    evaluations = [(str(line["split"]), line["step"]) for line in read_lines(run / "eval.jsonl")]
    assert evaluations == [("test", 0), ("dev", 0), ("dev", end), ("test", end)]
    assert_books_balance(run)


def test_a_stop_signal_checkpoints_and_leaves_nothing_running(recipe: Path, tmp_path: Path) -> None:
    """SIGINT, as Ctrl-C gives it; test_submit.py has SIGTERM. Until then the folder is the process's own."""
    run = tmp_path / "run"
    process = start_rexrag("train", recipe, "--run-dir", run, "--set", "train.steps=100000", "--set", "eval.every=0")
    try:
        wait_for(lambda: num_steps(run) >= 1, process=process)
        assert str(process.pid) in run_rexrag("train", "--run-dir", run, status=2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert not psutil.wait_procs(children, timeout=60)[1]
    steps = num_steps(run)
    assert (run / "checkpoints" / f"step-{steps:06d}" / "COMMIT").exists()
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert_books_balance(run)


def test_exact_weights_of_hint_free_probes(recipe: Path, tmp_path: Path) -> None:
    """What actors score, groups carry and the learner's two ranks weigh, with weights that change, then with one."""
    words = ["method=exact", "probe.transfer=hint_free", "probe.rate=1", "weights.inflight=recompute", "train.steps=2"]
    words += ["learner.num_ranks=2"]
    run = tmp_path / "run"
    run_rexrag("train", recipe, "--run-dir", run, *(part for word in words for part in ("--set", word)))
    lines = read_lines(run / "metrics.jsonl")
    assert [line[keys.MIXTURE_ALPHA] for line in lines] == [0.5, 0.5]
    for line in lines:
        assert (line[keys.PROBE_COUNT] or 0) > 0
        assert 0 < (line[keys.WEIGHT_MAX] or 0) <= 2.0 * 2.0 + 1e-6  # 1/(1 − α) times the cap on staleness
    assert_books_balance(run)
    run_rexrag("train", "--run-dir", run, "--set", "learner.num_ranks=1", "--set", "train.steps=3")
    assert num_steps(run) == 3


def test_a_run_that_trains_adapters_goes_on_from_them(recipe: Path, tmp_path: Path) -> None:
    """Actors and readers of checkpoints get whole weights, a resume the adapters; both are of the same policy."""
    run = tmp_path / "run"
    words = ["learner.lora=4", "optimizer.learning_rate=1e-2", "loss.kl_coef=0.01", "train.steps=2", "eval.every=0"]
    run_rexrag("train", recipe, "--run-dir", run, *(part for word in words for part in ("--set", word)))
    saved = run / "checkpoints" / "step-000002"
    base = Path(tomllib.loads((run / "config.toml").read_text())["model"]["path"])
    before, after = (load_file(folder / "model.safetensors") for folder in (base, saved))
    assert before.keys() == after.keys()
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert (saved / "adapter" / "adapter_config.json").exists()
    run_rexrag("train", "--run-dir", run, "--set", "train.steps=3")
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0][keys.POLICY_KL_REF] == pytest.approx(0.0, abs=1e-6)
    assert (lines[2][keys.POLICY_KL_REF] or 0) > 0
    assert all((line[keys.ENGINE_CANARY_KL] or 0) < 1e-3 for line in lines)
    assert_books_balance(run)


def test_refilling_gives_the_learner_informative_groups_alone(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["method=grpo", "replay.refill=true", "train.groups_per_step=3", "train.steps=2", "reward.kind=em + format"]
    run_rexrag("train", recipe, "--run-dir", run, *(part for word in words for part in ("--set", word)))
    assert [line[keys.GROUP_INFORMATIVE] for line in read_lines(run / "metrics.jsonl")] == [1.0, 1.0]
    accounting = assert_books_balance(run)
    assert accounting["consumed"] == 6
