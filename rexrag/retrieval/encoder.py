"""Texts become vectors: a transformers model without a head, its last layer pooled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from rexrag.data.rows import encodable
from rexrag.errors import ModelError, RetrievalIndexError, first_line
from rexrag.files import sha256_file
from rexrag.model.fetching import is_hub_id, resolve_model
from rexrag.model.loading import load_config, load_tokenizer
from rexrag.model.stored_weights import stored_tensors
from rexrag.model.weight_names import compare_names
from rexrag.retrieval.encoder_settings import EncoderOverrides, EncoderSettings, find_settings
from rexrag.types import Passage

Vectors = npt.NDArray[np.float32]
Device = Literal["cpu", "cuda"]

_BATCH_TOKENS: Final = 8192
"""Tokens of a pass, padding included: more gains nothing on a processor and takes memory."""
_GPU_BATCH_TOKENS: Final = 131_072
_MAX_BATCH: Final = 512


class Encoder:
    """An encoder in this process.

        encoder = Encoder.load(folder)
        vectors = encoder.queries(["currency of Gabon"])     # float32[1, D]

    Attributes:
        settings: how texts become vectors.
        dimension: D of a vector.
        sha256: of weights and tokenizer: another encoder has another one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        folder: Path,
        settings: EncoderSettings,
        sha256: str,
        device: Device,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.sha256 = sha256
        self.dimension = int(model.config.get_text_config().hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._batch_tokens = _GPU_BATCH_TOKENS if device == "cuda" else _BATCH_TOKENS
        pad = tokenizer.pad_token_id
        self._pad_id = int(pad) if isinstance(pad, int) else 0

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        settings: EncoderSettings | None = None,
        overrides: EncoderOverrides | None = None,
        device: Device = "cpu",
    ) -> Encoder:
        """Load an encoder: safetensors weights, in float32; no code that comes with it is run.

        Args:
            path: its folder, or a hub id.
            settings: those that an index was built with; without them they are found in the folder.
            overrides: what the user says in place of what is found.

        Raises:
            ModelError: no encoder there, one that cannot be loaded, or settings that are unknown or do not fit it.
        """
        folder = _folder_of(path)
        found = settings or find_settings(folder, overrides)
        load_config(folder)
        tokenizer = load_tokenizer(folder)
        model = _load_model(folder)
        return cls(
            model.to(device),  # type: ignore[arg-type]
            tokenizer,
            folder=folder,
            settings=found,
            sha256=fingerprint(folder),
            device=device,
        )

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors of queries, float32[N, D].

        Raises:
            RetrievalIndexError: a vector is not finite.
        """
        return self._encode([f"{self.settings.query_prefix}{text}" for text in texts])

    def passages(self, passages: Sequence[Passage]) -> Vectors:
        """Vectors of passages, float32[N, D]; of each its title, in quotes, and its text, as Search-R1 encodes them.

        Raises:
            RetrievalIndexError: a vector is not finite; says of which text.
        """
        return self._encode([f"{self.settings.passage_prefix}{contents(passage)}" for passage in passages])

    def _encode(self, texts: list[str]) -> Vectors:
        """Vectors of texts in their order; passes are of texts of about one length."""
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return result
        ids = self._token_ids(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        start = 0
        while start < len(order):
            size = max(1, min(_MAX_BATCH, self._batch_tokens // len(ids[order[start]])))
            rows = order[start : start + size]
            result[rows] = self._forward([ids[i] for i in rows])
            start += size
        if not np.isfinite(result).all():
            row = int(np.flatnonzero(~np.isfinite(result).all(axis=1))[0])
            raise RetrievalIndexError(
                f"{self.folder}: its vector of {texts[row][:80]!r} is not finite: its weights are damaged; "
                "take another encoder"
            )
        return result

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # Half a surrogate pair has no UTF-8 form, which the tokenizer asks for.
        whole = [encodable(text) for text in texts]
        encoded: Any = self._tokenizer(
            whole,
            truncation=True,
            max_length=self.settings.max_tokens,
            split_special_tokens=True,  # a text is data
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [ids or [self._pad_id] for ids in encoded["input_ids"]]

    def _forward(self, ids: list[list[int]]) -> Vectors:
        """Vectors of texts of which the first is the longest."""
        tokens = torch.full((len(ids), len(ids[0])), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            mask = mask.to(self._device)
            hidden = self._model(input_ids=tokens.to(self._device), attention_mask=mask).last_hidden_state.float()
            pooled = _pool(hidden, mask, self.settings)
            vectors: Vectors = pooled.cpu().numpy()
        return vectors


def _pool(hidden: Tensor, mask: Tensor, settings: EncoderSettings) -> Tensor:
    """[N, T, D] becomes [N, D]; padding is on the right."""
    if settings.pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
    elif settings.pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return torch.nn.functional.normalize(pooled, dim=-1) if settings.normalize else pooled


def contents(passage: Passage) -> str:
    """A passage as Search-R1's corpora write it: title in quotes, line break, text."""
    return f'"{passage.title}"\n{passage.text}' if passage.title else passage.text


def fingerprint(folder: Path) -> str:
    """Hex SHA-256 that tells encoders apart: of their weights and their tokenizer.

    Raises:
        ModelError: no safetensors weights.
    """
    files = sorted({tensor.file for tensor in stored_tensors(folder).values()})
    digest = hashlib.sha256()
    for file in (*files, folder / "tokenizer.json"):
        digest.update(bytes.fromhex(sha256_file(file)))
    return digest.hexdigest()


def _folder_of(path: str | Path) -> Path:
    name = str(path)
    if not Path(name).expanduser().is_dir() and not is_hub_id(name):
        raise ModelError(
            f"encoder {name}: no such folder; name a sentence encoder's, or a hub id of the form owner/name"
        )
    return resolve_model(name)


def _load_model(folder: Path) -> PreTrainedModel:
    try:
        loaded: Any = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # fault boundary: what a folder may hold is without bounds
        raise ModelError(
            f"no encoder could be loaded from {folder}: {first_line(error)}; name a folder with config.json, "
            "safetensors and tokenizer.json"
        ) from error
    model, info = loaded
    # What BERT has behind its last layer is not used here, and many encoders come without it.
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
    compare_names(missing=missing, unexpected=(), where=folder)
    model.train(False)
    assert isinstance(model, PreTrainedModel)
    return model
