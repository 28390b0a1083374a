"""A tiny Llama with a word-level tokenizer, made on the spot for the texts of a world.

It knows words, not spelling: every word of the texts is one token, and so is each control tag. Its text has a space
before each token, so that decoding is additive: the text of two token sequences is that of the one and the other.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rexrag.env.prompt import BUILT_IN_TEMPLATE
from rexrag.errors import ModelError
from rexrag.hints import DEFAULT_HINTS
from rexrag.model.saving import save_model

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"

_TAGS: Final = tuple(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/"))
_TOKEN: Final = r"</?(?:think|search|information|answer)>|\w+(?:[-'’]\w+)*|[^\w\s]"
_OWN_TEXTS: Final = (
    *_TAGS, *(hint.replace("|", "") for hint in DEFAULT_HINTS), BUILT_IN_TEMPLATE,
    " ".join(map(str, range(1, 21))), "Doc 1(Title: x) x",
    "That was no valid action: the turn has no complete action. Write <search>query</search> or <answer>text</answer>.",
)  # fmt: skip
"""What the program itself writes into a trajectory."""


def make_tiny_model(
    texts: Iterable[str],
    out: Path,
    *,
    seed: int,
    width: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    feed_forward: int = 256,
    context: int = 1024,
) -> Path:
    """Write an untrained model whose vocabulary is the words of `texts`; returns `out`.

    Raises:
        ModelError: `out` exists.
    """
    if out.exists():
        raise ModelError(f"{out} exists; name a folder that does not")
    tokenizer = make_word_tokenizer(texts, context=context)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=context,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        save_model(model, tokenizer, Path(scratch) / "model")
        (Path(scratch) / "model").rename(out)
    return out


def make_word_tokenizer(texts: Iterable[str], *, context: int) -> PreTrainedTokenizerFast:
    """The words and signs of the texts, each a token; anything else is one unknown token. Case counts."""
    words = {word for text in (*_OWN_TEXTS, *texts) for word in re.findall(_TOKEN, text)}
    vocabulary = {
        token: index for index, token in enumerate((PAD, UNKNOWN, END, *(f"▁{word}" for word in sorted(words))))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TOKEN), behavior="removed", invert=True),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
