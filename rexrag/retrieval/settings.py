"""Settings of the retriever: the table `[retriever]` of a recipe, and what a process opens its retriever from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from rexrag.retrieval.backoff import longest_search_s

Kind = Literal["bm25", "faiss", "ray", "http"]

REMOTE: Final = ("ray", "http")
"""Kinds whose searches leave the process: they may fail and wait."""


class RetrieverConfig(BaseModel):
    """The table `[retriever]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    kind: Kind = Field(
        "bm25",
        description="BM25 or dense index in each actor's process, a pool of search actors inside the run, or a server "
        "with the /retrieve API.",
    )
    path: Path | None = Field(None, description="Index folder (kinds `bm25`, `faiss` and `ray`).")
    encoder: Path | None = Field(
        None, description="Where the encoder of a dense index is now; None: where it was when the index was built."
    )
    url: str | None = Field(None, description="Base URL of the server (kind `http`), such as http://127.0.0.1:8000.")
    token_file: Path | None = Field(None, description="File with the server's bearer token (kind `http`).")
    timeout_s: float = Field(10.0, gt=0, le=600, description="Bound of one attempt (kinds `http` and `ray`), seconds.")
    max_retries: int = Field(
        5, ge=0, le=100, description="Attempts after the first before the episode is masked as `env_error`."
    )
    batch_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="Most queries of one request to a server (kind `http`), of those that wait at the same time; 1: "
        "each by itself.",
    )
    num_actors: int = Field(1, ge=1, le=1024, description="Search actors (kind `ray`).")
    num_cpus: float = Field(1.0, gt=0, le=1024, description="Cores that Ray reserves for each search actor.")
    num_gpus: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a GPU that Ray reserves for each search actor: for its encoder, and for the vectors "
        "where they fit; 0: on the CPU.",
    )
    resources: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        {}, description="Further Ray resources of each search actor, such as { retriever = 1 }."
    )

    @property
    def silent_s(self) -> float:
        """Seconds that one search may take."""
        return longest_search_s(timeout_s=self.timeout_s, max_retries=self.max_retries)


@dataclass(frozen=True, kw_only=True)
class RetrieverSettings:
    """What a process opens its retriever from: fields of `RetrieverConfig`."""

    kind: Kind
    path: Path | None
    encoder: Path | None
    url: str | None
    token_file: Path | None
    timeout_s: float
    max_retries: int
    batch_size: int
    num_actors: int


@dataclass(frozen=True, kw_only=True)
class SearchActorSettings:
    """What a search actor is built from. `num_gpus`: its share of a GPU; `log_file`: the run's `log.jsonl`."""

    path: Path
    encoder: Path | None
    num_gpus: float
    num_threads: int
    log_file: Path | None
