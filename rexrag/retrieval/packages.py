"""Packages of dense indexes, which a plain install lacks."""

from __future__ import annotations

from importlib.util import find_spec

from rexrag.errors import ConfigError


def require_faiss() -> None:
    """Say what is missing before a module that imports it does.

    Raises:
        ConfigError: FAISS is not installed.
    """
    if find_spec("faiss") is None:
        raise ConfigError(
            "a dense index needs FAISS, which is not installed; install it: pip install 'rexrag[retrieval]', or "
            "'rexrag[gpu]' where there is a GPU"
        )
