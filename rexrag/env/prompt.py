"""The one user message that a rollout, a demonstration and an evaluation begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rexrag.env.codec import Codec
from rexrag.env.observation import break_special_tokens
from rexrag.errors import ConfigError, ModelError
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
        ConfigError: a template without {question}, or a system prompt that the chat template refuses.
        ModelError: the chat template fails, or leaves the message out.
    """
    message = BUILT_IN_TEMPLATE if template is None else template
    _check(message, name="the prompt template")
    messages = [{"role": "user", "content": message}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        frame = codec.render_chat(messages, add_generation_prompt=True)
    except ModelError as error:
        if system_prompt is None:
            raise
        raise ConfigError(f"env.system_prompt: {error}; or unset env.system_prompt") from error
    _check_rendered(frame, system_prompt=system_prompt)
    data = break_special_tokens(question.strip(), special_tokens=codec.special_tokens)
    if frame is not None:
        # The whole text at once, so that the question merges with its surroundings as in any chat.
        return codec.encode_markup(frame.replace(PLACEHOLDER, data))
    plain = "\n\n".join(part["content"].strip() for part in messages) + "\n"
    return [*codec.bos_ids, *codec.encode(plain.replace(PLACEHOLDER, data))]


def _check_rendered(frame: str | None, *, system_prompt: str | None) -> None:
    """A chat template may leave a message out without a word."""
    if frame is not None and PLACEHOLDER not in frame:
        with_system = "" if system_prompt is None else "; or unset env.system_prompt, which it may take instead"
        raise ModelError(f"the model's chat template leaves the user's message out, or changes it{with_system}")


def _check(template: str, *, name: str) -> None:
    if PLACEHOLDER not in template:
        raise ConfigError(f"{name} does not contain {PLACEHOLDER}; put it where the question belongs")
