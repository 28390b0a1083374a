"""Joining a cluster for a question: bounded, and quiet."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Final, NoReturn

import ray

from rexrag.errors import ConfigError, first_line
from rexrag.run.cluster import check_form, check_listens, refusal

JOIN_TIMEOUT_S: Final = 60.0


@contextmanager
def joined(address: str) -> Iterator[None]:
    """A Ray that is joined while the block runs; what is printed meanwhile goes to stderr.

    Ray tells of nodes that died on stdout, where a command's answer belongs.

    Raises:
        ConfigError: the address is none, or no cluster could be joined there.
    """
    check_form(address)
    check_listens(address)
    with redirect_stdout(sys.stderr):
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    late = threading.Timer(JOIN_TIMEOUT_S, _give_up, (address,))
    late.daemon = True
    late.start()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:  # fault boundary: Ray raises bare ones, too
        if address == "auto":
            raise ConfigError(
                "no Ray runs on this machine, hence no run: name its cluster with --address, or its folder with --run"
            ) from error
        raise refusal(address, first_line(error)) from error
    finally:
        late.cancel()


def _give_up(address: str) -> NoReturn:
    """Ray waits for a cluster without a bound, in its own code: only the process can be ended."""
    os.write(2, f"error: {refusal(address, f'no answer within {JOIN_TIMEOUT_S:.0f} s')}\n".encode())
    os._exit(2)
