"""What one request may ask of a search server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. `default_top_k` is for requests that name none."""

    max_body_bytes: int = 8 << 20
    max_queries: int = 4096
    max_query_chars: int = 4096
    max_top_k: int = 100
    default_top_k: int = 3
