"""Small real sentence encoders, made on the spot: BERT with random weights over the words of a few passages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

DIMENSION = 32
FACTS = ("currency", "capital", "language")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def passage_rows(num_lands: int) -> list[dict[str, str]]:
    """Three short passages about each of so many lands, with words that only some of them share."""
    return [
        {
            "id": f"{fact}-{i}",
            "contents": f'"Land{i}"\nThe {fact} of Land{i} is the Coin{(7 * i + k) % 97} by Sea{i % 13}.',
        }
        for i in range(num_lands)
        for k, fact in enumerate(FACTS)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_encoder(folder: Path, *, num_lands: int = 200, seed: int = 0, dimension: int = DIMENSION) -> Path:
    """Save an encoder that knows the words of `passage_rows`; mean pooling, as nothing in its folder says otherwise."""
    words = ["the", "of", "is", "by", "what", "in", '"', ".", "?", ":", "query", "passage", "[", "]", "sep", *FACTS]
    words += [f"land{i}" for i in range(num_lands)]
    words += [f"coin{i}" for i in range(97)] + [f"sea{i}" for i in range(13)]
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dimension,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * dimension,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
