"""How texts become vectors with an encoder: found in its folder, kept in the manifest of an index, read from there.

What the user says comes first, then the conventions of the E5 and BGE families, then the files of
sentence-transformers, then mean pooling over the whole length that the model allows.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from rexrag.errors import ModelError

LOG = logging.getLogger(__name__)

Pooling = Literal["mean", "cls", "last"]

E5_TOKENS: Final = 256
_LONGEST: Final = 512
"""Where neither folder nor family says more: passages are no longer, and some models allow any length."""
_BGE_ENGLISH: Final = "Represent this sentence for searching relevant passages: "
_BGE_CHINESE: Final = "为这个句子生成表示以用于检索相关文章："
_POOLING_FLAGS: Final[Mapping[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_OWN_WAY: Final = re.compile(r"instruct|mistral|gemma|icl|llm", re.IGNORECASE)
"""Relatives of E5 and BGE over language models: each has an instruction of its own."""


class EncoderSettings(BaseModel):
    """How an encoder is used.

    Attributes:
        pooling: which of the last layer's vectors stand for a text: their mean, that of the first, or of the last
            token.
        normalize: whether vectors are brought to length 1, which makes inner products cosines.
        query_prefix: put before each query.
        passage_prefix: put before each passage.
        max_tokens: a text is cut there, special tokens included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int = Field(default=_LONGEST, ge=3)


@dataclass(frozen=True, kw_only=True)
class EncoderOverrides:
    """What a user says of an encoder; None leaves it to what is found."""

    pooling: Pooling | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_tokens: int | None = None


def find_settings(folder: Path, overrides: EncoderOverrides | None = None) -> EncoderSettings:
    """The settings of the encoder in a folder.

    Raises:
        ModelError: it pools in a way, or has a part, that is unknown here; a file of it is damaged; or a setting is
            out of bounds.
    """
    said = {name: value for name, value in vars(overrides or EncoderOverrides()).items() if value is not None}
    family = _family(_names(folder))
    found = {**_from_sentence_transformers(folder, said={**family, **said}), **family}
    longest = _longest(folder)
    values: dict[str, Any] = {"max_tokens": min(_LONGEST, longest), **found, **said}
    if not 3 <= values["max_tokens"] <= longest:
        raise ModelError(
            f"{folder}: max_tokens = {values['max_tokens']} of the encoder must be from 3 to the {longest} that its "
            "positions allow; give --max-tokens"
        )
    return EncoderSettings(**values)


def _names(folder: Path) -> list[str]:
    """What the encoder is called: its folder, its folder in the hub's cache, its name in config.json."""
    resolved = folder.resolve()
    names = [resolved.name]
    if resolved.parent.name == "snapshots":
        names.append(resolved.parent.parent.name.rpartition("--")[2])
    own = _json(folder / "config.json").get("_name_or_path")
    if isinstance(own, str):
        names.append(own.rstrip("/").rpartition("/")[2])
    return names


def _family(names: list[str]) -> dict[str, Any]:
    """The conventions of E5 and BGE, which their files do not hold."""
    for name in names:
        words = re.split(r"[^a-z0-9]+", name.lower())
        if not {"e5", "bge"} & set(words) or "reranker" in words:
            continue
        if _OWN_WAY.search(name):
            LOG.warning(
                "%s: encoders of this kind want an instruction of their own before a query, which their files do not "
                "hold; give it with --query-prefix",
                name,
            )
            return {}
        if "e5" in words:
            prefixes = {"query_prefix": "query: ", "passage_prefix": "passage: "}
            return {"pooling": "mean", "normalize": True, "max_tokens": E5_TOKENS, **prefixes}
        instruction = "" if "m3" in words else _BGE_CHINESE if "zh" in words else _BGE_ENGLISH
        return {"pooling": "cls", "normalize": True, "query_prefix": instruction, "passage_prefix": ""}
    return {}


def _from_sentence_transformers(folder: Path, *, said: Mapping[str, object]) -> dict[str, Any]:
    """What the files of sentence-transformers say; nothing where there are none."""
    if not (folder / "modules.json").exists():
        return {}
    modules = _json(folder / "modules.json", kind=list)
    try:
        kinds = {str(module["type"]).rpartition(".")[2]: folder / str(module["path"]) for module in modules}
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'modules.json'}: a module without type or path; fetch the encoder anew") from error
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelError(
            f"{folder}: its modules.json has {', '.join(sorted(unknown))}, and an encoder is Transformer, Pooling and "
            "Normalize here; take another encoder"
        )
    found: dict[str, Any] = {}
    if "Pooling" in kinds and "pooling" not in said:
        found["pooling"] = _pooling(kinds["Pooling"] / "config.json")
    lengths = sorted(kinds.get("Transformer", folder).glob("sentence_*_config.json"))
    if lengths and (longest := _json(lengths[0]).get("max_seq_length")):
        found["max_tokens"] = int(longest)
    settings = _json(folder / "config_sentence_transformers.json")
    # Without a word and without the module, cosines are what sentence-transformers compares by.
    found["normalize"] = "Normalize" in kinds or settings.get("similarity_fn_name") != "dot"
    prompts = settings.get("prompts") or {}
    both = prompts.get(settings.get("default_prompt_name") or "", "")
    found["query_prefix"] = prompts.get("query") or both
    found["passage_prefix"] = prompts.get("passage") or prompts.get("document") or both
    return found


def _pooling(path: Path) -> Pooling:
    values = _json(path)
    if not values:
        raise ModelError(f"{path}: missing or empty, though modules.json names it; give --pooling")
    on = [name for name, value in values.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(mode := values.get("pooling_mode"), str):
        on = [next((flag for flag, kind in _POOLING_FLAGS.items() if mode in (kind, f"{kind}token")), mode)]
    if len(on) != 1 or on[0] not in _POOLING_FLAGS or values.get("include_prompt") is False:
        shown = ", ".join(on) or "none"
        raise ModelError(f"{path}: pools by {shown}; mean, cls or last, prefix included, is needed: give --pooling")
    return _POOLING_FLAGS[on[0]]


def _longest(folder: Path) -> int:
    """Tokens that the model has positions for. Those of RoBERTa begin behind its padding id."""
    values = _json(folder / "config.json")
    positions = values.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 3:
        return _LONGEST
    shifted = values.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet")
    return positions - 2 if shifted else positions


def _json(path: Path, *, kind: type = dict) -> Any:  # noqa: ANN401  # what a file of somebody else's holds
    """The content of a JSON file; empty where there is none.

    Raises:
        ModelError: it is no JSON, or of another kind.
    """
    if not path.exists():
        return kind()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable JSON ({error}); fetch the encoder anew") from error
    if not isinstance(values, kind):
        raise ModelError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}; fetch the encoder anew")
    return values
