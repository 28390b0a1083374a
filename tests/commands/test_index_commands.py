"""`rexrag index` as a user types it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import faiss
import pytest
from tiny_encoders import make_encoder, passage_rows, write_rows

from rexrag.cli import main
from rexrag.commands.index import IndexAnalyser, recall_advice
from rexrag.data.corpus import iter_corpus
from rexrag.retrieval.analysers import ANALYSERS
from rexrag.retrieval.encoder import Encoder
from rexrag.retrieval.manifest import RecallEntry, read_manifest


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_encoder(tmp_path / "encoder", num_lands=20)
    write_rows(tmp_path / "c.jsonl", passage_rows(20))
    rows = [{"question": f"capital of Land{i}?", "golden_answers": ["x"]} for i in range(20)]
    write_rows(tmp_path / "q.jsonl", rows)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, words: str) -> int:
    """The exit status of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["rexrag", "index", *words.split()])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_build_and_check(world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    words = "build --corpus c.jsonl --out i --kind ivf --encoder encoder --questions q.jsonl --query-prefix query:"
    assert call(monkeypatch, f"{words} --pooling cls --no-normalize --max-tokens 30 --memory 1") == 0
    out, err = capfd.readouterr()
    first, second, third, fourth = out.splitlines()
    assert first.startswith("i: ivf, 60 passages, int8, ")
    assert (
        second
        == "encoder: cls of at most 30 tokens, their own length, 'query:' before each query, '' before each passage"
    )
    assert re.fullmatch(r"1 list, of which a search looks through 1, and compares \d+ candidates", third)
    assert fourth.startswith("recall against brute force, 10 queries: ")
    assert "encoding" in err
    assert call(monkeypatch, "check i") == 0
    assert capfd.readouterr().out == "i: ivf, 60 passages, as it was built\n"


def test_adopt(world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    vectors = Encoder.load(world / "encoder").passages(list(iter_corpus(world / "c.jsonl")))
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, "e5_Flat.index")
    words = "adopt e5_Flat.index --corpus c.jsonl --encoder encoder"
    assert call(monkeypatch, f"{words} --out i") == 0
    assert capfd.readouterr().out.startswith("i: adopted, 60 passages, as it was made, ")
    assert call(monkeypatch, f"{words} --out j --to flat-int8") == 0
    assert capfd.readouterr().out.startswith("j: flat, 60 passages, int8, ")
    rows = [json.loads(line) for line in Path("c.jsonl").read_text().splitlines()]
    write_rows(Path("other.jsonl"), rows[::-1])
    assert call(monkeypatch, f"{words.replace('c.jsonl', 'other.jsonl')} --out k") == 2
    assert "are not found in their place" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--encoder encoder --memory 2", "--encoder, --memory: of dense indexes only; add --kind flat or --kind ivf"),
        ("--kind flat", "--kind flat needs --encoder"),
        ("--kind flat --encoder nowhere", "encoder nowhere: no such folder"),
        ("--kind flat --encoder encoder --gpu", "--gpu: FAISS sees no GPU"),
        ("--kind flat --encoder encoder --memory 0", "--memory 0: must be at least 0.25 GB"),
        ("--kind ivf --encoder encoder --precision fp16", "--precision fp16: an ivf index has int8"),
        ("--kind flat --encoder encoder --max-tokens 1000", "max_tokens = 1000"),
    ],
)
def test_mistakes(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    assert call(monkeypatch, f"build --corpus c.jsonl --out i {words}") == 2
    assert expected in capsys.readouterr().err
    assert not Path("i").exists()


@pytest.mark.parametrize(
    ("kind", "precision", "advice"),
    [("flat", "int8", "--precision fp16"), ("ivf", "int8", "--memory"), ("adopted", None, "--to flat-fp16")],
)
def test_a_poor_recall_comes_with_what_to_change(
    world: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str | None, advice: str
) -> None:
    assert call(monkeypatch, "build --corpus c.jsonl --out i --kind flat --encoder encoder") == 0
    manifest = read_manifest(Path("i"))
    assert manifest.dense is not None
    for recall, expected in ((0.949, advice), (0.95, None)):
        entry = RecallEntry(queries=9, at_3=recall, at_10=1.0)
        dense = manifest.dense.model_copy(update={"recall": entry, "precision": precision})
        said = recall_advice(manifest.model_copy(update={"kind": kind, "dense": dense}))
        assert said is None if expected is None else expected in (said or "")


def test_the_words_of_bm25_may_be_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.value for one in IndexAnalyser} == set(ANALYSERS)
    assert call(monkeypatch, "build --corpus c.jsonl --out b") == 0
    assert read_manifest(world / "b").analyser == "english-1"
    assert call(monkeypatch, "build --corpus c.jsonl --out b --analyser cjk-english-1") == 0
    assert read_manifest(world / "b").analyser == "cjk-english-1"
    assert call(monkeypatch, "build --corpus c.jsonl --out d --kind flat --encoder encoder --analyser english-1") == 2
