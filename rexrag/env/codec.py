"""Text to token ids and back, without surprises: what is data never becomes a special token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rexrag.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK: Final = "zq7mark"
_TEMPLATE_REMEDY: Final = "correct chat_template (chat_template.jinja or tokenizer_config.json of the model folder)"


class Codec:
    """A tokenizer as rollouts, warm start and the hint pool use it.

        codec = Codec(AutoTokenizer.from_pretrained(folder))
        codec.decode(codec.encode("<|im_end|> is ordinary text"))

    Attributes:
        eos_ids: tokens that end a turn: the tokenizer's end of text, what its chat template puts behind an
            assistant's message, and what the model's generation settings name.
        special_tokens: texts of all special tokens, longest first.
        bos_ids: what the tokenizer puts before a text of its own accord (one token or none).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, end_ids: Collection[int] = ()) -> None:
        """
        Args:
            end_ids: further tokens that end a turn, from the model's generation settings.

        Raises:
            ModelError: the tokenizer is a slow one, knows no end of text, or has a chat template that fails.
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
        self._prepends_space = self._joins_with_space()
        self._wants_parts = False
        self._wants_parts = self._template_wants_parts()
        self.eos_ids: frozenset[int] = self._ending_ids() | frozenset(end_ids)
        if not self.eos_ids:
            raise ModelError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is data: no special token is added, none is read out of the text.

        Lone surrogates, which JSON lets through, become "?". A text is a piece of a longer one: where the tokenizer
        puts a space before each text by itself (SentencePiece), one that begins with a space does not get a second.
        """
        if self._prepends_space:
            text = text.removeprefix(" ")
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
        """The text that the chat template makes of messages; None for a tokenizer without one.

        Raises:
            ModelError: the template fails.
        """
        if not self._tokenizer.chat_template:
            return None
        shaped: list[Any] = [{**message, "content": self._content(message["content"])} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                shaped, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:  # fault boundary: a template is a program that came with the model
            raise ModelError(f"the model's chat template fails: {error}; {_TEMPLATE_REMEDY}") from error
        assert isinstance(text, str)
        return text

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self._wants_parts else text

    def _template_wants_parts(self) -> bool:
        """Whether messages must be lists of parts, as templates of multimodal models have them.

        Raises:
            ModelError: the template fails either way, or leaves the message out.
        """
        messages = [{"role": "user", "content": _MARK}]
        failure: ModelError | None = None
        for self._wants_parts in (False, True):
            try:
                text = self.render_chat(messages, add_generation_prompt=True)
            except ModelError as error:
                failure = failure or error
            else:
                if text is None or _MARK in text:
                    return self._wants_parts
        raise failure or ModelError(f"the model's chat template leaves the user's message out; {_TEMPLATE_REMEDY}")

    def _encode(self, text: str, *, split_special_tokens: bool) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        encoding = self._tokenizer(
            clean, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )
        return list(encoding["input_ids"])

    def _leading_ids(self) -> tuple[int, ...]:
        bos = self._tokenizer.bos_token_id
        return (bos,) if bos is not None and bos in self._tokenizer("").input_ids[:1] else ()

    def _joins_with_space(self) -> bool:
        """Whether the tokenizer puts a space before each text, which shows once the text follows another one."""
        ids = self._encode("a", split_special_tokens=True)
        return self.decode([*ids, *ids]).lstrip() == "a a"

    def _ending_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id} - {None}
        messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            text = self.render_chat(messages, add_generation_prompt=False) or ""
        except ModelError:
            text = ""  # a template for a single question has no end of an answer
        tail = text.rpartition(_MARK)[2]
        first = next((token for token in self.special_tokens if tail.lstrip().startswith(token)), None)
        if first is not None:
            ids.add(self._tokenizer.convert_tokens_to_ids(first))
        return frozenset(ids)
