"""A model is looked at before anything is started: by config.json, the headers of its weights, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerFast

from rexrag.env.codec import Codec
from rexrag.errors import ModelError, counted
from rexrag.model.fetching import resolve_model
from rexrag.model.loading import check_weights, end_ids, load_config, load_tokenizer
from rexrag.model.supported import check_supported


@dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """A model folder without a fault that can be seen without loading the weights."""

    folder: Path
    config: PretrainedConfig
    codec: Codec


def check_model(path: str | Path) -> CheckedModel:
    """Refuse, within a second or two, a model that the learner or the engine would refuse after the start.

    Raises:
        ModelError: no such model; an architecture that is not supported; weights that are missing, cut off, quantised
            or of another shape; a tokenizer that cannot be read or is larger than the embedding; a chat template
            that fails.
    """
    folder = resolve_model(str(path))
    config = load_config(folder)
    check_supported(config)
    check_weights(folder, config)
    return CheckedModel(folder=folder, config=config, codec=load_codec(folder, config=config))


def load_codec(path: str | Path, *, config: PretrainedConfig | None = None) -> Codec:
    """The tokenizer of a model, with all tokens that end a turn of it.

    Raises:
        ModelError: as `check_model`, of the tokenizer.
    """
    folder = resolve_model(str(path))
    config = config or load_config(folder)
    tokenizer = load_tokenizer(folder)
    _check_vocabulary(tokenizer, num_rows=int(config.get_text_config().vocab_size), folder=folder)
    return Codec(tokenizer, end_ids=end_ids(folder, config))


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, *, num_rows: int, folder: Path) -> None:
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= num_rows)
    if beyond:
        number, token = beyond[0]
        raise ModelError(
            f"{folder}: the tokenizer has {counted(len(tokenizer), 'token')}, the embedding "
            f"{counted(num_rows, 'row')}: {token!r} is token "
            f"{number}; resize the embedding (model.resize_token_embeddings), or use the model's own tokenizer"
        )
