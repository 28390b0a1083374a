"""Which Ray a run belongs to: the cluster that RAY_ADDRESS names, looked at before anything is prepared, or its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final

from rexrag.errors import ConfigError

REACH_TIMEOUT_S: Final = 20.0
JOIN_TIMEOUT_S: Final = 90.0
"""A driver joins a cluster in a few seconds, most of which are imports."""
_WITHOUT_PORT: Final = ("auto", "local")
_TRIAL: Final = """
import sys
try:
    import ray
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", configure_logging=False)
    ray.shutdown()
except Exception as error:
    told = " ".join(str(error).split()) or type(error).__name__
    if error.__cause__ is not None:  # whose last line is what it began with
        told += ": " + (str(error.__cause__).strip().splitlines() or [""])[-1]
    sys.stdout.write(told[:400])
    sys.exit(1)
"""
_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What a driver tells the cluster of its job, whose driver the trial is not."""
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
            f"(rexrag submit RECIPE --run-dir DIR), or {_FORM}"
        )
    _host_and_port(address)


def check_reachable(
    address: str | None, *, timeout_s: float = REACH_TIMEOUT_S, join_timeout_s: float = JOIN_TIMEOUT_S
) -> None:
    """Make sure that this process can join the cluster there: Ray itself would wait without a bound.

    Args:
        timeout_s: until somebody listens there; join_timeout_s: until a trial has joined.

    Raises:
        ConfigError: nobody listens, or not a Ray that takes this process, or the address is none.
    """
    check_form(address)
    if address is None or address == "local":
        return
    check_listens(address, timeout_s=timeout_s)
    _try_to_join(address, timeout_s=join_timeout_s)


def refusal(address: str, reason: str) -> ConfigError:
    """The error of a cluster that cannot be joined."""
    return ConfigError(
        f"RAY_ADDRESS = {address}: no Ray cluster could be joined there ({reason.rstrip('.')}); "
        f"is a Ray head running there, of this version? If not, start it, {_FORM}"
    )


def check_listens(address: str, *, timeout_s: float = REACH_TIMEOUT_S) -> None:
    """Make sure that somebody listens at an address that has a port.

    Raises:
        ConfigError: nobody does.
    """
    if address in _WITHOUT_PORT:
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise ConfigError(
            f"RAY_ADDRESS = {address}: cannot be reached ({reason}); start the cluster, {_FORM}"
        ) from None


def _try_to_join(address: str, *, timeout_s: float) -> None:
    """Join in a process of its own: one that waits inside Ray can only be ended."""
    environment = {key: value for key, value in os.environ.items() if key != _JOB}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL, address],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise refusal(address, f"no answer within {timeout_s:g} s") from None
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip().splitlines()
        raise refusal(address, said[0] if said else f"Ray ended with exit code {done.returncode}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS = {address}: must be HOST:PORT; {_FORM}")
    return host.strip("[]"), int(port)
