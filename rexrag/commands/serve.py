"""`rexrag index serve`: from the words of the command line to a server that runs until it is told to end."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from rexrag.errors import ConfigError, counted
from rexrag.processes import num_cores
from rexrag.retrieval.bearer import read_token
from rexrag.retrieval.limits import Limits

_PACKAGES: Final = ("fastapi", "uvicorn", "prometheus_client")
_LIMITS: Final = Limits()


def serve_index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Index folder.")],
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback are reached from outside.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="F", help="File with a bearer token, which clients must send.")
    ] = None,
    top_k: Annotated[
        int, typer.Option("--topk", min=1, help="Passages for requests that name no number.")
    ] = _LIMITS.default_top_k,
    max_top_k: Annotated[int, typer.Option("--max-topk", min=1, help="Most passages of a query.")] = _LIMITS.max_top_k,
    max_queries: Annotated[int, typer.Option(min=1, help="Most queries of a request.")] = _LIMITS.max_queries,
    max_query_chars: Annotated[int, typer.Option(min=1, help="Most characters of a query.")] = _LIMITS.max_query_chars,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = _LIMITS.max_body_bytes,
    deadline: Annotated[float, typer.Option(min=0.001, max=3600, help="Bound of a request, seconds.")] = 60.0,
    encoder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the encoder of a dense index is now.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute; by default one for each core.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Encode on a GPU, and search there where the vectors fit.")
    ] = False,
) -> None:
    """Answer searches over HTTP, with Search-R1's API, until SIGTERM or Ctrl-C."""
    if top_k > max_top_k:
        raise ConfigError(f"--topk {top_k}: must be at most --max-topk ({max_top_k}); lower the one or raise the other")
    _require_packages()
    num_threads = threads or num_cores()
    _prepare_process(num_threads, gpu=gpu)
    from rexrag.retrieval.folders import open_index
    from rexrag.retrieval.server import ServerSettings, bind, is_loopback, serve

    token = None if token_file is None else read_token(token_file, name="--token-file")
    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_queries=max_queries,
        max_query_chars=max_query_chars,
        max_top_k=max_top_k,
        default_top_k=top_k,
    )
    told = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, markup=False)
    with bind(host, port) as listener:
        index = open_index(folder, encoder=encoder, gpu_share=float(gpu), num_threads=num_threads)
        if token is None and not is_loopback(listener):
            told.print(
                f"warning: --host {host}: whoever reaches this machine can search the corpus; give --token-file, or "
                "listen at 127.0.0.1"
            )
        place = f"[{host}]" if ":" in host else host
        told.print(
            f"{folder}: {counted(index.num_passages, 'passage')} at http://{place}:{listener.getsockname()[1]}/retrieve"
        )
        serve(index, settings=ServerSettings(limits=limits, token=token, deadline_s=deadline), listener=listener)


def _prepare_process(num_threads: int, *, gpu: bool) -> None:
    """Set what the libraries read when they are first imported; with `gpu` see that there is one."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--gpu: torch sees no GPU; leave it out, or install torch for CUDA where there is one")


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"rexrag index serve needs {', '.join(missing)}, not installed here; install the packages of search "
            "servers: pip install 'rexrag[retrieval]'"
        )
