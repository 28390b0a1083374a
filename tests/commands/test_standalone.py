"""A model outside a run: with the settings of its run, but for what only training needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_servers import passages, serve

from rexrag.commands.standalone import evaluate, settings_for
from rexrag.errors import ConfigError, ModelError
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.recipe import load_recipe, resolved_toml
from rexrag.retrieval.bm25 import build_bm25
from rexrag.run_folder import RunFolder
from rexrag.types import Question

RECIPE = """
[model]
path = "model"
[data]
train = "train.jsonl"
[retriever]
path = "index"
[probe]
hints = "hints.txt"
[env]
max_turn_tokens = 16
max_observation_tokens = 64
max_trajectory_tokens = 256
"""
QUESTION = Question(id="1", data_source="own", question="Where is Homs?", golden_answers=("Syria",))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    passages = [{"id": "0", "contents": '"Homs"\nHoms is in Syria.'}, {"id": "1", "contents": '"Oman"\nOman.'}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    build_bm25(tmp_path / "corpus.jsonl", tmp_path / "index")
    return tmp_path / "index"


def make_run(folder: Path, text: str) -> RunFolder:
    """A run of a recipe with one checkpoint, `step-000002`."""
    (folder / "train.jsonl").write_text("")
    (folder / "hints.txt").write_text("<think> | Next I need\n")
    (folder / "recipe.toml").write_text(text)
    recipe = load_recipe(folder / "recipe.toml")
    run = RunFolder.create(folder / "run", recipe="r", seed=0, config=resolved_toml(recipe))
    checkpoint = run.checkpoints / "step-000002"
    make_tiny_model(["Where is Homs ? Syria"], checkpoint, seed=0, width=16, num_layers=1, num_heads=2)
    (checkpoint / "COMMIT").touch()
    return run


def test_a_recipe_and_single_settings_take_the_place_of_a_runs(tmp_path: Path, index: Path) -> None:
    run = make_run(tmp_path, RECIPE)
    other = tmp_path / "other.toml"
    other.write_text(
        "[env]\nmax_turns = 1\nmax_turn_tokens = 16\nmax_observation_tokens = 64\nmax_trajectory_tokens = 200\n"
    )
    _, settings = settings_for(str(run.root), index=str(index), recipe=other)
    assert (settings.episodes.max_trajectory_tokens, settings.episodes.max_turns) == (200, 1)
    _, settings = settings_for(str(run.root), index=str(index), overrides=["env.max_turns=3"])
    assert (settings.episodes.max_trajectory_tokens, settings.episodes.max_turns) == (256, 3)
    make_tiny_model(["Where is Homs ? Syria"], tmp_path / "model", seed=0, width=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match=r"--set env\.max_turns=3: is over a run's settings, or a recipe's"):
        settings_for(str(tmp_path / "model"), index=str(index), overrides=["env.max_turns=3"])


def test_a_run_is_evaluated_without_its_file_of_hints(tmp_path: Path, index: Path) -> None:
    run = make_run(tmp_path, RECIPE)
    (tmp_path / "hints.txt").unlink()
    path, settings = settings_for(str(run.root), index=str(index))
    assert path == run.checkpoints / "step-000002"
    assert settings.episodes.max_trajectory_tokens == 256, "the run's limits"
    [score] = evaluate(settings, questions=[QUESTION], step=2)
    assert score.em == 0.0


def test_a_run_whose_model_was_spread_over_gpus_is_evaluated_where_there_are_none(tmp_path: Path, index: Path) -> None:
    run = make_run(tmp_path, RECIPE + "[rollout]\nnum_gpus = 4\ntensor_parallel = 4\n")
    _, settings = settings_for(str(run.root), index=str(index))
    assert settings.tensor_parallel == 1


def test_a_runs_token_and_encoder_are_for_its_own_server_and_index(tmp_path: Path, index: Path) -> None:
    (tmp_path / "secret").write_text("s" * 40)
    with serve(lambda request: (200, passages("a"))) as own, serve(lambda request: (200, passages("a"))) as other:
        server = f'kind = "http"\nurl = "{own.url}/"\ntoken_file = "secret"'
        run = make_run(tmp_path, RECIPE.replace('path = "index"', server))
        for url, token_file in ((own.url, None), (other.url, None), (other.url, tmp_path / "secret")):
            settings_for(str(run.root), index=url, token_file=token_file)
        sent = [[request.headers.get("Authorization") for request in server.requests] for server in (own, other)]
    assert set(sent[0]) == {f"Bearer {'s' * 40}"}
    assert sent[1] == [None, None, *[f"Bearer {'s' * 40}"] * 2]


def test_a_model_without_a_run_gets_limits_that_fit_its_context(tmp_path: Path, index: Path) -> None:
    for context, limit in ((1024, 1024), (8192, 4096)):
        folder = make_tiny_model(["a"], tmp_path / str(context), seed=0, width=16, num_layers=1, context=context)
        _, settings = settings_for(str(folder), index=str(index))
        assert settings.episodes.max_trajectory_tokens == limit
    small = make_tiny_model(["a"], tmp_path / "small", seed=0, width=16, num_layers=1, context=64)
    with pytest.raises(ModelError, match="context is 64 tokens"):
        settings_for(str(small), index=str(index))


def test_a_broken_model_is_refused_before_anything_is_loaded(tmp_path: Path, index: Path) -> None:
    folder = make_tiny_model(["a"], tmp_path / "m", seed=0, width=16, num_layers=1)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is cut off"):
        settings_for(str(folder), index=str(index))
