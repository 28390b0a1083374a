"""What `[prepare]` makes is whole, in the run folder, and made again where it has gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rexrag.config import Config
from rexrag.errors import ModelError
from rexrag.model.loading import load_model, load_tokenizer
from rexrag.preparation.prepare import prepare
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.recipe import make_config
from rexrag.reporting.terminal import Progress


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has the model of the quick start, small."""
    monkeypatch.setenv("REXRAG_CACHE", str(tmp_path / "cache"))
    make_tiny_model(["words"], tmp_path / "cache" / "smollm2-135m-instruct", seed=0, width=16, num_layers=1)
    return tmp_path / "cache"


def prepared(config: Config, folder: Path) -> None:
    with Progress() as progress:
        prepare(config, folder=folder, num_threads=1, progress=progress)


def smollm2() -> Config:
    return make_config({"prepare.model": "smollm2-135m-instruct"}, sources={})


def test_the_run_folder_has_the_model_itself(cache: Path, tmp_path: Path) -> None:
    prepared(smollm2(), tmp_path / "prepared")
    shutil.move(tmp_path / "prepared", tmp_path / "elsewhere")
    shutil.rmtree(cache)
    assert not any(path.is_symlink() for path in (tmp_path / "elsewhere").rglob("*"))
    load_model(tmp_path / "elsewhere" / "model", dtype="float32")
    load_tokenizer(tmp_path / "elsewhere" / "model")


def test_a_link_that_leads_nowhere_is_replaced_by_the_model(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "model").symlink_to(tmp_path / "another-nodes-cache")
    prepared(smollm2(), tmp_path / "prepared")
    load_model(tmp_path / "prepared" / "model", dtype="float32")
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["model"], "no scratch folder stays"


def test_a_model_that_the_run_will_refuse_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = make_tiny_model(["words"], tmp_path / "m", seed=0, width=16, num_layers=1)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}), encoding="utf-8")
    values = {"model.path": str(folder), "prepare.world": "geo"}
    with pytest.raises(ModelError, match="activation 'gelu' is not supported"):
        prepared(make_config(values, sources={}), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
