"""Ray's token: sent to any cluster where there is one."""

from __future__ import annotations

import os
from pathlib import Path


def use_token() -> None:
    """Let Ray send its token. To be called before Ray is imported, which reads the variable then.

    By itself it sends one only to a cluster that it has found by itself.
    """
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
