"""Text to token ids and back, without surprises: what is data never becomes a special token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rexrag.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "MARK"


class Codec:
    """A tokenizer as rollouts, warm start and the hint pool use it.

        codec = Codec(AutoTokenizer.from_pretrained(folder))
        codec.decode(codec.encode("<|im_end|> is ordinary text"))

    Attributes:
        eos_ids: tokens that end a turn: the tokenizer's end of text, and what its chat template puts behind an
            assistant's message.
        special_tokens: texts of all special tokens, longest first.
        bos_ids: what the tokenizer puts before a text of its own accord (one token or none).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """
        Raises:
            ModelError: the tokenizer is a slow one, or knows no end of text.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} is a slow one, which cannot keep special tokens out of data; "
                "use a model folder with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials = added | {str(token) for token in tokenizer.all_special_tokens}
        self.special_tokens: tuple[str, ...] = tuple(sorted(specials, key=lambda token: (-len(token), token)))
        self.bos_ids: tuple[int, ...] = self._leading_ids()
        self.eos_ids: frozenset[int] = self._ending_ids()
        if not self.eos_ids:
            raise ModelError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is data: no special token is added, none is read out of the text.

        Lone surrogates, which JSON lets through, become "?".
        """
        return self._encode(text, split_special_tokens=True)

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of a rendered chat template: special tokens in the text become their ids."""
        return self._encode(text, split_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included, nothing cleaned up."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str | None:
        """The text that the chat template makes of messages; None for a tokenizer without one."""
        if not self._tokenizer.chat_template:
            return None
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
        assert isinstance(text, str)
        return text

    def _encode(self, text: str, *, split_special_tokens: bool) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        encoding = self._tokenizer(
            clean, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        return list(encoding["input_ids"])

    def _leading_ids(self) -> tuple[int, ...]:
        bos = self._tokenizer.bos_token_id
        return (bos,) if bos is not None and bos in self._tokenizer("").input_ids[:1] else ()

    def _ending_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id} - {None}
        messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        tail = (self.render_chat(messages, add_generation_prompt=False) or "").rpartition(_MARK)[2]
        first = next((token for token in self.special_tokens if tail.lstrip().startswith(token)), None)
        if first is not None:
            ids.add(self._tokenizer.convert_tokens_to_ids(first))
        return frozenset(ids)
