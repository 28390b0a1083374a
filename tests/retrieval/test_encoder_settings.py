"""`rexrag.retrieval.encoder_settings`: what is found in an encoder's folder, and what is not guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rexrag.errors import ModelError
from rexrag.retrieval.encoder_settings import EncoderOverrides, EncoderSettings, find_settings

ENGLISH = "Represent this sentence for searching relevant passages: "


def folder_of(parent: Path, name: str, **files: object) -> Path:
    """An encoder's folder with these JSON files: `modules` is modules.json, and so on."""
    folder = parent / name
    (folder / "1_Pooling").mkdir(parents=True)
    for key, content in {"config": {"max_position_embeddings": 512, "model_type": "bert"}, **files}.items():
        path = folder / ("1_Pooling/config.json" if key == "pooling" else f"{key}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def modules(*kinds: str) -> list[dict[str, object]]:
    places = {"Transformer": "", "Pooling": "1_Pooling"}
    return [
        {
            "idx": i,
            "name": str(i),
            "path": places.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]


def pooling(*modes: str) -> dict[str, object]:
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    return {"word_embedding_dimension": 384, **{f"pooling_mode_{name}": name in modes for name in names}}


WHOLE = modules("Transformer", "Pooling", "Normalize")


def test_without_any_word_it_is_the_mean_over_what_the_model_allows(tmp_path: Path) -> None:
    assert find_settings(folder_of(tmp_path, "mine")) == EncoderSettings(pooling="mean", normalize=True, max_tokens=512)


def test_files_of_sentence_transformers_are_followed(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        "mine",
        modules=WHOLE,
        pooling=pooling("cls_token"),
        sentence_bert_config={"max_seq_length": 128, "do_lower_case": False},
        config_sentence_transformers={"prompts": {"query": "find: ", "document": "text: "}},
    )
    assert find_settings(folder) == EncoderSettings(
        pooling="cls", normalize=True, query_prefix="find: ", passage_prefix="text: ", max_tokens=128
    )


@pytest.mark.parametrize(
    ("parts", "settings", "normalize"),
    [
        (WHOLE, {"similarity_fn_name": "dot"}, True),
        (WHOLE[:2], {"similarity_fn_name": "dot"}, False),
        (WHOLE[:2], {"similarity_fn_name": "cosine"}, True),
        (WHOLE[:2], {}, True),
    ],
)
def test_lengths_are_kept_only_where_dot_products_are_meant(
    tmp_path: Path, parts: object, settings: object, normalize: bool
) -> None:
    folder = folder_of(
        tmp_path, "m", modules=parts, pooling=pooling("mean_tokens"), config_sentence_transformers=settings
    )
    assert find_settings(folder).normalize is normalize


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (pooling("mean_tokens"), "mean"),
        (pooling("lasttoken"), "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_both_forms_of_the_pooling_file_are_read(tmp_path: Path, file: object, expected: str) -> None:
    assert find_settings(folder_of(tmp_path, "m", modules=WHOLE, pooling=file)).pooling == expected


@pytest.mark.parametrize("name", ["e5-base-v2", "multilingual-e5-small", "E5_large"])
def test_e5_has_its_prefixes_its_mean_and_256_tokens(tmp_path: Path, name: str) -> None:
    files = {"modules": WHOLE, "pooling": pooling("mean_tokens"), "sentence_bert_config": {"max_seq_length": 512}}
    assert find_settings(folder_of(tmp_path, name, **files)) == EncoderSettings(
        pooling="mean", normalize=True, query_prefix="query: ", passage_prefix="passage: ", max_tokens=256
    )


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("bge-base-en-v1.5", ENGLISH),
        ("bge-small-zh-v1.5", "为这个句子生成表示以用于检索相关文章："),
        ("bge-m3", ""),
    ],
)
def test_bge_has_its_instruction_before_queries_and_the_first_token(
    tmp_path: Path, name: str, instruction: str
) -> None:
    assert find_settings(folder_of(tmp_path, name)) == EncoderSettings(
        pooling="cls", normalize=True, query_prefix=instruction, passage_prefix="", max_tokens=512
    )


def test_the_name_may_be_that_in_the_cache_of_the_hub_or_in_config_json(tmp_path: Path) -> None:
    cached = folder_of(tmp_path / "models--intfloat--e5-base-v2" / "snapshots", "0123abc")
    named = folder_of(tmp_path, "x", config={"_name_or_path": "BAAI/bge-base-en", "max_position_embeddings": 512})
    assert find_settings(cached).query_prefix == "query: "
    assert find_settings(named).query_prefix == ENGLISH


def test_a_name_that_only_contains_the_letters_is_no_relative(tmp_path: Path) -> None:
    for name in ("base5-v2", "code5", "badge"):
        assert find_settings(folder_of(tmp_path, name)).query_prefix == ""


def test_relatives_with_instructions_of_their_own_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = find_settings(folder_of(tmp_path, "multilingual-e5-large-instruct"))
    assert settings.query_prefix == ""
    assert "--query-prefix" in caplog.text


def test_a_family_whose_pooling_file_is_not_there_is_known_all_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "e5-base-v2", modules=WHOLE)
    assert not (folder / "1_Pooling" / "config.json").exists()
    assert find_settings(folder).pooling == "mean"


def test_what_the_user_says_comes_first(tmp_path: Path) -> None:
    said = EncoderOverrides(pooling="last", normalize=False, query_prefix="", passage_prefix="p: ", max_tokens=100)
    assert find_settings(folder_of(tmp_path, "e5-base"), said) == EncoderSettings(
        pooling="last", normalize=False, query_prefix="", passage_prefix="p: ", max_tokens=100
    )


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "m", config={"max_position_embeddings": 130, "model_type": "xlm-roberta"})
    assert find_settings(folder).max_tokens == 128


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"modules": modules("Transformer", "Pooling", "Dense")}, "modules.json has Dense"),
        ({"modules": WHOLE, "pooling": pooling("max_tokens")}, "pools by pooling_mode_max_tokens"),
        ({"modules": WHOLE, "pooling": pooling("mean_tokens", "cls_token")}, "pools by .*cls_token, .*mean_tokens"),
        ({"modules": WHOLE, "pooling": {**pooling("mean_tokens"), "include_prompt": False}}, "prefix included"),
        ({"modules": WHOLE}, "missing or empty"),
        ({"modules": "{"}, "not readable JSON"),
        ({"modules": {}}, "expected a JSON array"),
        ({"modules": [{}]}, "without type or path"),
        ({"config": []}, "expected a JSON object"),
    ],
)
def test_what_is_unknown_is_refused(tmp_path: Path, files: dict[str, object], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        find_settings(folder_of(tmp_path, "m", **files))


def test_a_pooling_that_is_unknown_may_be_overruled(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "m", modules=WHOLE, pooling=pooling("max_tokens"))
    assert find_settings(folder, EncoderOverrides(pooling="mean")).pooling == "mean"


@pytest.mark.parametrize("max_tokens", [2, 513])
def test_lengths_that_the_model_has_no_positions_for(tmp_path: Path, max_tokens: int) -> None:
    with pytest.raises(ModelError, match=f"max_tokens = {max_tokens} .* from 3 to the 512"):
        find_settings(folder_of(tmp_path, "m"), EncoderOverrides(max_tokens=max_tokens))
