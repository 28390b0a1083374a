from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from transformers import PreTrainedTokenizerFast

from rexrag.data.corpus import iter_corpus
from rexrag.data.demonstrations import GOING_ON, Demonstration, load_demonstrations
from rexrag.data.questions import load_questions
from rexrag.env.actions import Answer, Search, parse_action
from rexrag.env.codec import Codec
from rexrag.env.observation import render_observation
from rexrag.errors import ConfigError
from rexrag.preparation.tiny_model import make_word_tokenizer
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.worlds.chains import Chain
from rexrag.worlds.dead_end_demonstrations import KIND_SHARES, plan_demonstrations
from rexrag.worlds.world import WorldFiles
from rexrag.worlds.write import WorldKind, world_texts, write_world

SIZE = {"train": 200, "dev": 60, "test": 100, "demonstrations": 120, "decision_weight": 0.25}
KINDS: tuple[WorldKind, ...] = ("geo", "synthetic")


@pytest.fixture(scope="module", params=KINDS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_world(request.param, tmp_path_factory.mktemp("worlds") / request.param, seed=3, size=SIZE)


def turns(demonstration: Demonstration) -> list[str]:
    """The policy's turns: its text between observations."""
    found = [""]
    for segment in demonstration.segments:
        if segment.text.startswith("\n\n<information>"):
            found.append("")
        else:
            found[-1] += segment.text
    return found


def test_rows_are_what_a_run_reads(files: WorldFiles) -> None:
    corpus = {passage.id: passage for passage in iter_corpus(files.corpus)}
    assert len(corpus) == files.counts["corpus"]
    for path in (files.train, files.dev, files.test):
        questions = load_questions(path).questions
        assert len(questions) == files.counts[path.stem]
        for question in questions:
            assert question.gold_passage_ids is not None
            assert len(question.gold_passage_ids) == question.hops
            assert question.golden_answers[0] in corpus[question.gold_passage_ids[-1]].text


def test_info_tells_dials_counts_and_whose_data_it_is(files: WorldFiles) -> None:
    info = json.loads(files.info.read_text(encoding="utf-8"))
    assert info["seed"] == 3
    assert info["dials"]["decision_weight"] == 0.25
    assert info["dials"]["top_k"] == 2
    assert info["counts"]["demonstrations"] == 120
    assert bool(info["attribution"]) == (info["kind"] == "geo")


def test_the_worlds_index_answers_every_query_of_a_chain(files: WorldFiles, tmp_path: Path) -> None:
    build_bm25(files.corpus, tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    queries = [
        (parse_action(text), segment.text)
        for one in load_demonstrations(files.demonstrations)
        for text, segment in zip(turns(one), [s for s in one.segments if "<information>" in s.text], strict=False)
    ]
    assert len(queries) > 150
    for action, shown in queries:
        assert isinstance(action, Search)
        found = asyncio.run(retriever.search(action.query, top_k=2))
        assert len(found) == 2
        assert all(passage.text in shown for passage in found)


def test_demonstrations_leave_a_dead_end(files: WorldFiles) -> None:
    """Questions of more hops are answered after the first search, except behind the marked decision."""
    corpus_text = " ".join(passage.text for passage in iter_corpus(files.corpus))
    kinds: Counter[str] = Counter()
    for one in load_demonstrations(files.demonstrations):
        actions = [parse_action(turn) for turn in turns(one)]
        assert isinstance(actions[-1], Answer)
        assert all(isinstance(action, Search) for action in actions[:-1])
        assert actions[-1].text in corpus_text
        decisions = [segment for segment in one.segments if segment.text == GOING_ON]
        kinds["going on" if decisions else f"{len(actions) - 1} search"] += 1
        assert len(decisions) == (len(actions) > 2), "one decision, and only where the search goes on"
        assert all(segment.weight == 0.25 for segment in decisions)
        others = [segment for segment in one.segments if segment.text != GOING_ON]
        assert all(segment.weight == (0.0 if "<information>" in segment.text else 1.0) for segment in others)
    assert kinds == {"going on": 42, "1 search": 78}


def test_observations_are_tokenised_as_in_a_rollout(files: WorldFiles, tmp_path: Path) -> None:
    codec = Codec(make_word_tokenizer(world_texts(files.folder), context=512))
    build_bm25(files.corpus, tmp_path / "index")
    retriever = BM25Retriever(tmp_path / "index")
    for one in load_demonstrations(files.demonstrations)[:20]:
        action = parse_action(one.segments[0].text)
        assert isinstance(action, Search)
        passages = asyncio.run(retriever.search(action.query, top_k=2))
        assert codec.encode(one.segments[1].text) == render_observation(passages, codec=codec, max_tokens=500).ids


def test_as_many_demonstrations_are_planned_as_were_asked_for() -> None:
    chain = Chain(path=("a", "b"), relations=("r",))
    for count in range(1, 60):
        plan = plan_demonstrations(one_hop=[chain], multi_hop=[chain], count=count, rng=Random(0))
        assert len(plan) == count
        for kind, share in KIND_SHARES.items():
            assert abs(sum(one == kind for _, one in plan) - count * share) <= 1


def test_every_word_of_a_world_is_in_its_vocabulary(files: WorldFiles) -> None:
    tokenizer: PreTrainedTokenizerFast = make_word_tokenizer(world_texts(files.folder), context=512)
    unknown = tokenizer.unk_token_id
    for question in load_questions(files.test).questions:
        assert unknown not in Codec(tokenizer).encode(question.question + " " + question.golden_answers[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind: WorldKind, tmp_path: Path) -> None:
    size = SIZE | {"demonstrations": 20}
    one, same, other = (write_world(kind, tmp_path / str(i), seed=seed, size=size) for i, seed in enumerate((5, 5, 6)))
    for name in ("corpus", "train", "dev", "test", "demonstrations", "info"):
        assert getattr(one, name).read_bytes() == getattr(same, name).read_bytes()
    assert one.test.read_bytes() != other.test.read_bytes()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"demonstration": 4}, "no dial 'demonstration', did you mean 'demonstrations'"),
        ({"test": 2}, r"dial test = 2 of world geo must be a whole number in \[8, 2000\]"),
        ({"test": 10.5}, "must be a whole number"),
        ({"decision_weight": 1.5}, r"must be a number in \[0.0, 1.0\]"),
        ({"decision_weight": float("nan")}, "must be a number"),
    ],
)
def test_bad_dials_are_refused_before_anything_is_written(tmp_path: Path, size: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_world("geo", tmp_path / "world", seed=0, size=size)
    assert not (tmp_path / "world").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_world("geo", tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
