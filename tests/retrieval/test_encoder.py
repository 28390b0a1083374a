"""`rexrag.retrieval.encoder` against a plain forward pass of the same model, text by text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_encoders import DIMENSION, make_encoder
from transformers import AutoModel, AutoTokenizer

from rexrag.errors import ModelError, RetrievalIndexError
from rexrag.retrieval.encoder import Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderOverrides, EncoderSettings, Pooling
from rexrag.types import Passage

LAND = Passage(id="1", title="Land1", text="The capital of Land1 is the Coin7.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder)


def plain(folder: Path, text: str, *, pooling: Pooling = "mean", normalize: bool = True) -> Vectors:
    """The vector of one text, without padding, by the model's own classes."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    result: Vectors = (vector / vector.norm() if normalize else vector).numpy()
    return result


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_the_model(folder: Path, pooling: Pooling, normalize: bool) -> None:
    encoder = Encoder.load(folder, overrides=EncoderOverrides(pooling=pooling, normalize=normalize))
    texts = ["capital of Land1", "what is the currency of Land2 by Sea3?", "Land4"]
    found = encoder.queries(texts)
    assert found.dtype == np.float32
    assert found.shape == (3, DIMENSION)
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_allclose(vector, plain(folder, text, pooling=pooling, normalize=normalize), atol=1e-5)


def test_prefixes_stand_before_the_text_and_titles_in_quotes(folder: Path) -> None:
    said = EncoderOverrides(query_prefix="query: ", passage_prefix="passage: ")
    encoder = Encoder.load(folder, overrides=said)
    np.testing.assert_allclose(encoder.queries(["Land1"])[0], plain(folder, "query: Land1"), atol=1e-5)
    expected = plain(folder, f'passage: "Land1"\n{LAND.text}')
    np.testing.assert_allclose(encoder.passages([LAND])[0], expected, atol=1e-5)
    untitled = Passage(id="1", title="", text="Land2")
    np.testing.assert_allclose(encoder.passages([untitled])[0], plain(folder, "passage: Land2"), atol=1e-5)


WORDS = st.sampled_from(["land1", "land2", "capital", "of", "the", "[SEP]", "\ud800", "\x00", "?", "é", ""])


@settings(max_examples=10, deadline=None)
@given(texts=st.lists(st.lists(WORDS, max_size=70).map(" ".join), max_size=4))
def test_what_else_is_in_the_batch_makes_no_difference(encoder: Encoder, texts: list[str]) -> None:
    together = encoder.queries(texts)
    assert together.shape == (len(texts), DIMENSION)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(vector, encoder.queries([text])[0], atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_special_token_in_a_text_is_text(encoder: Encoder) -> None:
    written, spelt = encoder.queries(["land1 [SEP] land2", "land1 [ sep ] land2"])
    np.testing.assert_allclose(written, spelt, atol=1e-6)


def test_long_texts_are_cut(folder: Path) -> None:
    encoder = Encoder.load(folder, overrides=EncoderOverrides(max_tokens=6))
    long, short = encoder.queries(["land1 land2 land3 land4 land5 land6", "land1 land2 land3 land4"])
    np.testing.assert_allclose(long, short, atol=1e-6)


def test_settings_of_an_index_count_whatever_the_folder_says(folder: Path) -> None:
    kept = EncoderSettings(pooling="cls", query_prefix="query: ", max_tokens=7)
    assert Encoder.load(folder, settings=kept).settings == kept


def changed(folder: Path, out: Path, *, scale: float) -> Path:
    """The same encoder with one weight multiplied."""
    make_encoder(out)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    weights[name] = weights[name] * scale
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_another_encoder_has_another_hash(folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    assert Encoder.load(make_encoder(tmp_path / "again")).sha256 == encoder.sha256
    assert Encoder.load(changed(folder, tmp_path / "changed", scale=1.001)).sha256 != encoder.sha256


def test_vectors_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = Encoder.load(changed(folder, tmp_path / "broken", scale=float("nan")))
    with pytest.raises(RetrievalIndexError, match="'land1' is not finite: its weights are damaged"):
        broken.queries(["land1"])


def test_folders_that_are_no_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder .*nowhere: no such folder"):
        Encoder.load(tmp_path / "nowhere")
    pickled = make_encoder(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        Encoder.load(pickled)
    partial = make_encoder(tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for 1 parameter .*layer\.1\.output"):
        Encoder.load(partial)
