"""What cannot be used is refused before anything starts: the message names it, and nothing is written half."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from rexrag.cli import main
from rexrag.errors import UserError
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.retrieval.bm25 import build_bm25
from rexrag.run.inputs import read_inputs
from rexrag.run.plan import open_run, plan_run

RECIPE = """
[model]
path = "model"
[data]
train = "train.jsonl"
[retriever]
path = "index"
[env]
max_turn_tokens = 64
max_observation_tokens = 64
max_trajectory_tokens = 512
"""
QUESTION = {"id": "1", "question": "Where is Homs?", "golden_answers": ["Syria"]}
PASSAGES = [{"id": "0", "contents": '"Homs"\nHoms is in Syria.'}, {"id": "1", "contents": '"Oman"\nOman is a country.'}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with all that it names, in order."""
    write_rows(tmp_path / "train.jsonl", QUESTION)
    write_rows(tmp_path / "corpus.jsonl", *PASSAGES)
    build_bm25(tmp_path / "corpus.jsonl", tmp_path / "index")
    make_tiny_model(["Where is Homs ? Syria"], tmp_path / "model", seed=0, width=16, num_layers=1, num_heads=2)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def write_rows(path: Path, *rows: Mapping[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, *overrides: str) -> None:
    """Go as far as a run goes before it starts Ray."""
    plan = plan_run(folder / "recipe.toml", overrides=overrides, run_dir=folder / "run", resume="auto")
    with open_run(plan) as request:
        read_inputs(request)


def test_the_recipe_itself_is_fine(folder: Path) -> None:
    start(folder)


def no_question_file(folder: Path) -> None:
    (folder / "train.jsonl").unlink()


def empty_data_set(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


def no_answer(folder: Path) -> None:
    write_rows(folder / "train.jsonl", QUESTION, {**QUESTION, "id": "2", "golden_answers": []})


def undecodable_line(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"id": "1", "question": "\xff"}\n')


def no_tokenizer(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()


def no_config(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def template_that_fails(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")


def damaged_index(folder: Path) -> None:
    name = max((path for path in (folder / "index").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(name.read_bytes())
    data[len(data) // 2] ^= 0xFF
    name.write_bytes(bytes(data))


def other_corpus(folder: Path) -> None:
    write_rows(folder / "corpus.jsonl", *PASSAGES, {"id": "2", "contents": '"Peru"\nPeru is a country.'})


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (no_question_file, r"data\.train.*train\.jsonl"),
    (empty_data_set, r"train\.jsonl"),
    (no_answer, r"train\.jsonl.*line 2.*answer"),
    (undecodable_line, r"train\.jsonl.*line 1"),
    (no_tokenizer, r"tokenizer"),
    (no_config, r"model"),
    (no_weights, r"no model could be loaded.*model\.safetensors"),
    (template_that_fails, r"chat template fails: not today"),
    (damaged_index, r"index"),
    (other_corpus, r"corpus"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_broken_files(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){message}"):
        start(folder)
    assert not (folder / "run").exists()


def test_broken_parquet(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"train\.parquet"):
        start(folder, f"data.train={folder}/train.parquet")


def test_skipped_and_repeated_questions_are_told(folder: Path) -> None:
    nameless = {key: value for key, value in QUESTION.items() if key != "id"}
    write_rows(folder / "train.jsonl", nameless, nameless, {**QUESTION, "golden_answers": []})
    plan = plan_run(
        folder / "recipe.toml", overrides=["data.skip_bad_rows=true"], run_dir=folder / "run", resume="auto"
    )
    with open_run(plan) as request:
        notes = read_inputs(request).notes
    assert "bad rows skipped: 1 of 3" in notes[0]
    assert "text of an earlier one: 1" in notes[1]


def test_a_reward_module_that_breaks_is_found_before_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "my_broken_reward.py").write_text("def score(p, g, row)\n    return 1\n")
    with pytest.raises(UserError, match=r"my_broken_reward breaks .*SyntaxError.*my_broken_reward\.py, line 1"):
        start(folder, "reward.kind=my_broken_reward:score")


def test_a_reward_function_is_tried_before_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "my_signed_reward.py").write_text(
        "def score(p, g, row):\n    return 1.0 if p in g else -0.5\ndef gone(p, g, row):\n    return row['gone']\n"
    )
    normalized = ("method=exact", "correction.mixture=normalized", "loss.baseline=joint")
    with pytest.raises(UserError, match=r"returned -0\.5 .* correction\.mixture = \"normalized\" .* at least 0"):
        start(folder, "reward.kind=my_signed_reward:score", *normalized)
    with pytest.raises(UserError, match=r"my_signed_reward:gone' raised KeyError"):
        start(folder, "reward.kind=my_signed_reward:gone")
    start(folder, "reward.kind=my_signed_reward:score", "method=grpo")


def test_a_reward_function_sees_the_whole_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    write_rows(folder / "train.jsonl", {**QUESTION, "difficulty": 0.5})
    (folder / "my_reward_by_row.py").write_text("def score(p, g, row):\n    return row['difficulty'] * (p in g)\n")
    start(folder, "reward.kind=my_reward_by_row:score")


def test_context_too_small(folder: Path) -> None:
    with pytest.raises(UserError, match=r"context is 1024.*2048.*env\.max_trajectory_tokens"):
        start(folder, "env.max_trajectory_tokens=2048")


def test_context_too_small_for_a_scored_hint(folder: Path) -> None:
    """An exact hint-free weight scores a target with a hint in it, which makes it longer than any trajectory."""
    words = ("env.max_trajectory_tokens=1024", "method=exact", "probe.transfer=hint_free", "probe.filter=none")
    with pytest.raises(UserError, match=r"context is 1024 tokens, the run .*1024 and \d+ for a scored hint\) needs 10"):
        start(folder, *words)
    start(folder, "env.max_trajectory_tokens=1000", *words[1:])


def test_no_room_for_a_turn_behind_the_prompt(folder: Path) -> None:
    (folder / "prompt.txt").write_text("Where is Homs ? " * 200 + "{question}")
    with pytest.raises(UserError, match=r"max_trajectory_tokens = 512: the prompt of the shortest .* tokens already"):
        start(folder, f"env.prompt_file={folder}/prompt.txt")


@pytest.mark.parametrize(
    ("turn", "trajectory", "message"),
    [
        (64, 512, r"max_turn_tokens = 64: the longest hint has 61 tokens and 8 more"),
        (100, 160, r"max_trajectory_tokens = 160: .*longest hint \(61\) and a turn \(100\) need \d+"),
    ],
)
def test_no_room_for_a_hint(folder: Path, turn: int, trajectory: int, message: str) -> None:
    (folder / "hints.txt").write_text("<think> " + "Where is Homs " * 20 + "\n")
    words = (
        f"probe.hints={folder}/hints.txt", f"env.max_turn_tokens={turn}", f"env.max_trajectory_tokens={trajectory}",
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        start(folder, *words)
    start(folder, *words, "probe.rate=0")


def test_no_turn_for_a_probe(folder: Path) -> None:
    with pytest.raises(UserError, match=r"max_turns = 0: .* no rollout could be probed"):
        start(folder, "env.max_turns=0")
    start(folder, "env.max_turns=0", "probe.rate=0")


def test_hint_with_an_action_tag(folder: Path) -> None:
    (folder / "hints.txt").write_text("<think> Next I need\n<search>\n")
    with pytest.raises(UserError, match=r"hints\.txt:2.*<search>"):
        start(folder, f"probe.hints={folder}/hints.txt")


def test_unreachable_retriever(folder: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    words = ("retriever.kind=http", f"retriever.url={url}", "retriever.timeout_s=1", "retriever.max_retries=0")
    (folder / "recipe.toml").write_text(RECIPE.replace('path = "index"', ""))
    with pytest.raises(UserError, match=url):
        start(folder, *words)


def test_a_password_in_the_retrievers_url_is_refused_and_not_told(folder: Path) -> None:
    (folder / "recipe.toml").write_text(RECIPE.replace('path = "index"', ""))
    with pytest.raises(UserError, match=r"retriever\.url: has a user or password in it") as refused:
        start(folder, "retriever.kind=http", "retriever.url=http://me:secret@127.0.0.1:9")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "rows",
    [[{"contents": '"Homs"\nHoms is in Syria.'}], [PASSAGES[0], PASSAGES[0]]],
    ids=["without ids", "with double ids"],
)
def test_corpus_that_cannot_be_indexed_leaves_no_index(folder: Path, rows: list[Mapping[str, object]]) -> None:
    write_rows(folder / "bad.jsonl", *rows)
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        build_bm25(folder / "bad.jsonl", folder / "new")
    assert not (folder / "new").exists()


def test_more_gpus_than_there_are_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "synthetic.toml"
    words = ["rollout.num_actors=99", "rollout.num_gpus=1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rexrag", "train", str(recipe), *(f"--set={word}" for word in words)])
    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert "99 rollout actors with rollout.num_gpus = 1" in told.err
    assert "run folder" not in told.out + told.err
    assert not (tmp_path / "runs").exists()
