"""The file with a bearer token, which a search server asks its clients for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rexrag.errors import ConfigError

_MAX_CHARS: Final = 4096


def read_token(path: Path, *, name: str) -> str:
    """The token in a file: one word of printable ASCII, white space around it dropped.

    Args:
        name: of the setting or option that names the file, for messages.

    Raises:
        ConfigError: no such file, or no such word in it.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{name} = {path}: cannot be read ({reason}); name a file with the token in it") from None
    if not text or len(text) > _MAX_CHARS or not all("!" <= letter <= "~" for letter in text):
        raise ConfigError(
            f"{name} = {path}: must hold one word of at most {_MAX_CHARS} letters, digits and signs of ASCII, such as "
            "what `openssl rand -hex 32` prints"
        )
    return text
