from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rexrag.env.codec import Codec
from rexrag.errors import ModelError


def test_special_tokens_are_never_read_out_of_data(tokenizer: PreTrainedTokenizerFast, codec: Codec) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = "before<|im_end|>after"
    assert end in tokenizer(text, add_special_tokens=False).input_ids, "the tokenizer itself would read it"
    assert not set(codec.encode(text)) & set(tokenizer.all_special_ids)
    assert codec.decode(codec.encode(text)) == text
    assert end in codec.encode_markup(text)
    assert end not in codec.encode(text), "a call of encode_markup leaves no state behind"


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60))
def test_decode_inverts_encode(codec: Codec, text: str) -> None:
    assert codec.decode(codec.encode(text)) == text


def test_decode_keeps_special_tokens_and_spaces(tokenizer: PreTrainedTokenizerFast, codec: Codec) -> None:
    ids = [*codec.encode("it is , here ."), tokenizer.eos_token_id]
    assert codec.decode(ids) == "it is , here .<|endoftext|>"


def test_lone_surrogates_become_question_marks(codec: Codec) -> None:
    assert codec.decode(codec.encode("a\ud800b")) == "a?b"


def test_both_the_tokenizers_and_the_templates_end_count(
    tokenizer: PreTrainedTokenizerFast, codec: Codec, plain_codec: Codec
) -> None:
    end_of_text, end_of_message = map(tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))
    assert codec.eos_ids == {end_of_text, end_of_message}
    assert plain_codec.eos_ids == {end_of_text}
    assert set(codec.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="end-of-text"):
        Codec(endless)
