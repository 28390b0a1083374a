"""A model and its tokenizer become a folder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write model and tokenizer as one folder that `load_model` and `load_tokenizer` read."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
