"""Which Ray a run belongs to: the cluster that RAY_ADDRESS names, looked at before anything is prepared, or its own."""

from __future__ import annotations

import os
import socket
from typing import Final

from rexrag.errors import ConfigError

REACH_TIMEOUT_S: Final = 20.0
_WITHOUT_PORT: Final = ("auto", "local")
_FORM: Final = (
    "give the head's own address, such as RAY_ADDRESS=10.0.0.1:6379, or unset it to train on this machine alone."
)


def cluster_address() -> str | None:
    """Where the Ray cluster is that this process belongs to, as a job of it does; None: a Ray of its own."""
    return os.environ.get("RAY_ADDRESS") or None


def check_form(address: str | None) -> None:
    """Refuse an address that no cluster has.

    Raises:
        ConfigError: the address of a job server, or none of the form HOST:PORT.
    """
    if address is None or address in _WITHOUT_PORT:
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS = {address}: is where jobs are submitted to, and a run is such a job: submit it "
            f"(cluster/submit.sh, or ray job submit --address {address} -- rexrag train ...), or {_FORM}"
        )
    _host_and_port(address)


def check_reachable(address: str | None, *, timeout_s: float = REACH_TIMEOUT_S) -> None:
    """Make sure that somebody listens there: Ray itself would wait without a bound.

    Raises:
        ConfigError: nobody does, or the address is none.
    """
    check_form(address)
    if address is None or address in _WITHOUT_PORT:
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise ConfigError(
            f"RAY_ADDRESS = {address}: cannot be reached ({reason}); start the cluster, {_FORM}"
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS = {address}: must be HOST:PORT; {_FORM}")
    return host.strip("[]"), int(port)
