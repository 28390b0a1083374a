"""The one user message that a rollout, a demonstration and an evaluation begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from jinja2 import TemplateError

from rexrag.env.codec import Codec
from rexrag.env.observation import break_special_tokens
from rexrag.errors import ConfigError
from rexrag.files import read_user_text

PLACEHOLDER: Final = "{question}"

BUILT_IN_TEMPLATE: Final = (
    "Think in <think> whenever you learn something. <search>query</search> returns <information>; "
    "search as often as you need. Finish with a brief <answer>text</answer>.\nQuestion: {question}"
)


def read_template(path: Path) -> str:
    """The user message of `env.prompt_file`.

    Raises:
        ConfigError: no readable UTF-8 file, or one without {question}.
    """
    try:
        template = read_user_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env.prompt_file = {path} cannot be read: {error}") from error
    _check(template, name=f"env.prompt_file = {path}")
    return template


def render_prompt(
    question: str, *, codec: Codec, template: str | None = None, system_prompt: str | None = None
) -> list[int]:
    """Token ids of the prompt for a question, ready for the model's first turn.

    Args:
        question: data; special tokens in it are broken up by a space.
        template: text of the user message, {question} in it stands for the question; None: the built-in one.
        system_prompt: None leaves it to the chat template. A tokenizer without a chat template gets system
            prompt and message as plain text.

    Raises:
        ConfigError: a template without {question}, or messages that the chat template refuses.
    """
    message = BUILT_IN_TEMPLATE if template is None else template
    _check(message, name="the prompt template")
    messages = [{"role": "user", "content": message}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        frame = codec.render_chat(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses the prompt: {error}; unset env.system_prompt") from error
    data = break_special_tokens(question.strip(), special_tokens=codec.special_tokens)
    if frame is not None:
        # The whole text at once, so that the question merges with its surroundings as in any chat.
        return codec.encode_markup(frame.replace(PLACEHOLDER, data))
    plain = "\n\n".join(part["content"].strip() for part in messages) + "\n"
    return [*codec.bos_ids, *codec.encode(plain.replace(PLACEHOLDER, data))]


def _check(template: str, *, name: str) -> None:
    if PLACEHOLDER not in template:
        raise ConfigError(f"{name} does not contain {PLACEHOLDER}; put it where the question belongs")
