from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rexrag.env.actions import STOP_STRINGS, Search, locate_action
from rexrag.env.codec import Codec
from rexrag.env.prompt import render_prompt
from rexrag.errors import ModelError
from rexrag.hints import DEFAULT_HINTS
from rexrag.model.loading import load_model, load_tokenizer
from rexrag.preparation.tiny_model import make_tiny_model, make_word_tokenizer

TEXTS = ["The mayor of Mira Dolan is Kin Otro.", "N'Djamena, Port-au-Prince: .uk"]
CODEC = Codec(make_word_tokenizer(TEXTS, context=64))
KNOWN = ("The", "mayor", "Mira", "Dolan", "N'Djamena", "Port-au-Prince", ".", "<search>", "</answer>", "\n", " ")


@settings(deadline=None, max_examples=100)
@given(words=st.lists(st.sampled_from(KNOWN), max_size=12), cut=st.integers(0, 12))
def test_decoding_is_additive_and_encoding_undoes_it(words: list[str], cut: int) -> None:
    ids = CODEC.encode(" ".join(words))
    text = CODEC.decode(ids)
    assert text.split() == " ".join(words).split()
    assert CODEC.decode(ids[:cut]) + CODEC.decode(ids[cut:]) == text
    assert CODEC.encode(text) == ids


def test_a_word_is_one_token_wherever_it_stands() -> None:
    ids = CODEC.encode("<answer>Mira</answer> of Mira, (Mira)")
    assert ids.count(CODEC.encode("Mira")[0]) == 3
    assert all(len(CODEC.encode(tag)) == 1 for tag in ("<think>", *STOP_STRINGS, "N'Djamena", "Port-au-Prince"))


def test_actions_are_found_in_its_tokens() -> None:
    ids = CODEC.encode("<think> The mayor. </think>\n<search>the mayor of Mira Dolan</search>")
    located = locate_action(ids, codec=CODEC)
    assert located.action == Search("the mayor of Mira Dolan")
    assert located.start == ids.index(CODEC.encode("<search>")[0])


def test_tags_are_ordinary_and_the_end_token_is_never_read_out_of_text() -> None:
    assert CODEC.encode("<|end|>") != [next(iter(CODEC.eos_ids))]
    assert not {"<think>", "<search>"} & set(CODEC.special_tokens)


def test_what_the_program_writes_is_in_the_vocabulary() -> None:
    unknown = CODEC.encode("zyx")[0]
    prompt = render_prompt("The mayor of Mira Dolan", codec=CODEC)
    assert unknown not in prompt
    assert all(unknown not in CODEC.encode(hint.replace("|", "")) for hint in DEFAULT_HINTS)


def test_it_is_a_normal_model_folder_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    folders = [make_tiny_model(TEXTS, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    assert 0.2e6 < sum(parameter.numel() for parameter in model.parameters()) < 0.4e6
    assert load_model(folders[0], dtype="float32").config.vocab_size == len(load_tokenizer(folders[0]))


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists; name a folder that does not"):
        make_tiny_model(TEXTS, tmp_path, seed=0)
