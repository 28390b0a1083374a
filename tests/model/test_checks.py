"""What is wrong with a model folder is seen before its weights are loaded, and again when they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rexrag.env.codec import Codec
from rexrag.env.prompt import render_prompt
from rexrag.errors import ModelError
from rexrag.learner.checkpoint import save_checkpoint
from rexrag.learner.trainer_state import TrainerState
from rexrag.model import fetching
from rexrag.model.checks import check_model, load_codec
from rexrag.model.fetching import resolve_model
from rexrag.model.loading import load_model
from rexrag.model.saving import save_model
from rexrag.preparation.tiny_model import make_word_tokenizer

TOKENIZER = make_word_tokenizer(["some words"], context=64)


def make(folder: Path, *, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(LlamaForCausalLM(config), TOKENIZER, folder)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(file: Path, **values: object) -> None:
    stored = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**stored, **values}))


def without_head(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: w for name, w in weights.items() if name != "lm_head.weight"})


def wrapped(folder: Path) -> None:
    change_weights(folder, lambda weights: {f"module.{name}": w for name, w in weights.items()})


def without_a_layer(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: w for name, w in weights.items() if ".1." not in name})


def larger_vocabulary(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=len(TOKENIZER) + 64)


def integers(folder: Path) -> None:
    change_weights(folder, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.int8)})


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def cut_in_the_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def adapter_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')


def quantized(method: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        change_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})

    damage.__name__ = method
    return damage


BROKEN_WEIGHTS: list[tuple[Callable[[Path], None], str]] = [
    (without_head, r"no weights for 1 parameter of the model: lm_head\.weight; they would be random"),
    (wrapped, r'no weights for 21 parameters.*all the same with "module\." before the name'),
    (without_a_layer, r"no weights for 9 parameters of the model: model\.layers\.1\..*, \.\.\."),
    (larger_vocabulary, r"lm_head\.weight has the shape \(\d+, 16\), by config\.json it has \(\d+, 16\)"),
    (integers, r"lm_head\.weight is stored as I8, a quantised type"),
    (cut_off, r"is cut off: it has \d+ bytes, its header says \d+; fetch the model anew"),
    (cut_in_the_header, r"is cut off or no safetensors file \(100 bytes\)"),
    (empty, r"\(0 bytes\)"),
    (lfs_pointer, r"Git LFS pointer.*git lfs pull"),
    (missing_shard, r"lacks 1 of 2 files of its weights, such as model-00002"),
    (adapter_alone, r"has an adapter.*merge it into its model"),
    (adapter_beside, r"has an adapter.*or remove that file"),
    *((quantized(method), f"is quantised.*{method}") for method in ("bitsandbytes", "gptq", "awq", "fp8")),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN_WEIGHTS, ids=[damage.__name__ for damage, _ in BROKEN_WEIGHTS])
def test_broken_weights(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        check_model(folder)
    with pytest.raises(ModelError, match=message):
        load_model(folder, dtype="float32")


def test_a_good_model_has_no_fault(folder: Path) -> None:
    checked = check_model(folder)
    assert checked.config.vocab_size == len(TOKENIZER)
    assert checked.codec.eos_ids == {TOKENIZER.eos_token_id}


def test_a_tied_head_need_not_be_stored_and_must_not_differ(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    check_model(folder)
    load_model(folder, dtype="float32")
    change_weights(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1.0})
    with pytest.raises(ModelError, match=r"ties the output head .* another"):
        load_model(folder, dtype="float32")


def test_a_body_without_its_prefix_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", tied=True)
    whole = load_model(folder, dtype="float32").state_dict()
    change_weights(folder, lambda weights: {name.removeprefix("model."): w for name, w in weights.items()})
    check_model(folder)
    loaded = load_model(folder, dtype="float32").state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_weights_that_are_not_used_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda weights: weights | {"value_head.weight": torch.zeros(1, 16)})
    load_model(folder, dtype="float32")
    assert "1 weight not used, being none of the model's: value_head.weight" in caplog.text


def other_architecture(folder: Path) -> None:
    change_json(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])


def growing_rope(folder: Path) -> None:
    change_json(folder / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})


def larger_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer.json", added_tokens=added_token(len(TOKENIZER) + 3))


def added_token(number: int) -> list[dict[str, object]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    known = json.loads(TOKENIZER.backend_tokenizer.to_str())["added_tokens"]
    return [*known, {"id": number, "content": "<|extra|>", "special": True, **flags}]


def unknown_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer.json", model={"type": "OfTomorrow", "vocab": {}})


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (other_architecture, r"model type 'gpt2' is not supported.*llama, qwen2, qwen3"),
    "rope": (growing_rope, r"rotary embedding 'dynamic' is not supported"),
    "tokenizer size": (larger_tokenizer, r"'<\|extra\|>' is token \d+; resize the embedding"),
    "tokenizer format": (unknown_tokenizer, r"no tokenizer could be loaded from .*tokenizer\.json"),
    "template syntax": (template("{{ messages[0]['content'] }"), "chat template fails: unexpected"),
    "template raises": (template("{{ raise_exception('not today') }}"), "chat template fails: not today"),
    "template of nothing": (template("hello"), "chat template leaves the user's message out"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_faults(folder: Path, name: str) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        check_model(folder)


def test_a_template_of_content_parts_gets_them(folder: Path) -> None:
    template("{% for m in messages %}<user> {{ m['content'][0]['text'] }}{% endfor %}")(folder)
    codec = check_model(folder).codec
    ids = render_prompt("some words", codec=codec, template="{question}")
    assert codec.decode(ids).split() == codec.decode(codec.encode("<user> some words")).split()


def test_all_tokens_that_the_generation_settings_name_end_a_turn(folder: Path) -> None:
    eos = TOKENIZER.eos_token_id
    change_json(folder / "generation_config.json", eos_token_id=[eos, 7, len(TOKENIZER) + 5])
    assert load_codec(folder).eos_ids == {eos, 7}
    (folder / "generation_config.json").unlink()
    assert load_codec(folder).eos_ids == {eos}
    change_json(folder / "config.json", eos_token_id=[eos, 9])
    assert load_codec(folder).eos_ids == {eos, 9}


def test_invalid_generation_settings_do_not_keep_a_model_from_being_saved(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json(folder / "generation_config.json", do_sample=False, temperature=0.6, eos_token_id=[2, 7])
    model = load_model(folder, dtype="float32")
    assert "generation_config.json is invalid" in caplog.text
    state = TrainerState(
        step=1, num_updates=0, success=0.1, bad_steps=0, num_solved=0, mean_tokens=None, branch_counts=[],
        optimizer={}, adapters={}, preserved={}, rng=torch.get_rng_state(),
    )  # fmt: skip
    saved = save_checkpoint(tmp_path, model=model, tokenizer=TOKENIZER, trainer_state=state)
    assert load_codec(saved).eos_ids == {2, 7}


@pytest.mark.parametrize("name", ["modle", "./modle", "runs/modle", "a/b/c", "~/no/such"])
def test_a_mistyped_path_is_refused_without_asking_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetching, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"does not exist; name a model folder.*owner/name"):
        resolve_model(name)


def test_a_hub_id_is_asked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        asked.append(name)
        if name != "owner/good":
            raise ConnectionError("no network")
        return str(folder)

    monkeypatch.setattr(fetching, "snapshot_download", snapshot)
    assert resolve_model("owner/good") == folder
    with pytest.raises(ModelError, match=r"owner/other is no path here, .*\(no network\)"):
        resolve_model("owner/other")
    assert asked == ["owner/good", "owner/other"]


def test_of_an_encoder_on_the_hub_the_pooling_is_fetched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["config.json", "modules.json", "1_Pooling/config.json", "onnx/model.json", "old/model.safetensors"]
    cache = tmp_path / "snapshots" / "abc"

    def snapshot(
        name: str, *, allow_patterns: list[str], ignore_patterns: Sequence[str] = (), revision: str = "abc", **_: object
    ) -> str:
        for file in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=list(ignore_patterns)):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).write_text("{}")
        assert revision == "abc"
        return str(cache)

    monkeypatch.setattr(fetching, "snapshot_download", snapshot)
    assert resolve_model("owner/encoder") == cache
    fetched = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}
    assert fetched == {"config.json", "modules.json", "1_Pooling/config.json"}


def test_a_codec_by_itself_has_the_tokenizers_end_alone() -> None:
    assert Codec(TOKENIZER).eos_ids == {TOKENIZER.eos_token_id}
