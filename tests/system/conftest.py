"""A small world with a tiny model that has learnt the format, made once for all runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from system_runs import RECIPE

from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.preparation.warmstart import warm_start
from rexrag.retrieval.bm25 import build_bm25
from rexrag.worlds.write import world_texts, write_world


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file over the world; paths in it are absolute."""
    folder = tmp_path_factory.mktemp("small")
    size = {"train": 200, "dev": 8, "test": 8, "demonstrations": 400, "entities": 60, "distractors": 0, "words": 20}
    files = write_world("synthetic", folder / "world", seed=1, size=size)
    build_bm25(files.corpus, folder / "index")
    make_tiny_model(world_texts(files.folder), folder / "untrained", seed=1, width=64, num_layers=2, feed_forward=128)
    warm_start(
        folder / "untrained",
        demonstrations=files.demonstrations,
        out=folder / "model",
        learning_rate=5e-3,
        batch_size=16,
        epochs=1,
        threads=2,
    )
    path = folder / "small.toml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs take their time, more of it where other work is going on: they have bounds of their own."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
