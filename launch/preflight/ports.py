"""The port at which ranks find each other."""

import os
import socket
from collections.abc import Iterator

from launch.preflight.findings import Finding, failed, ok, warning
from launch.preflight.subject import Subject

TORCHRUN_PORT = 29500  # torchrun's default, where MASTER_PORT is not set


def check_ports(subject: Subject) -> Iterator[Finding]:
    """Free on this machine, if this machine is where the ranks meet."""
    text = os.environ.get("MASTER_PORT", str(TORCHRUN_PORT))
    port = int(text) if text.isdecimal() else 0
    if not 0 < port < 1 << 16:
        yield failed(f"MASTER_PORT={text} is not a port: give a number from 1024 to 65535")
        return
    address = os.environ.get("MASTER_ADDR", "localhost")
    if not _is_here(address):
        yield warning(f"not checked: the ranks meet at {address}:{port}, which is another machine")
    elif (reason := _find_obstacle(port)) is not None:
        yield failed(f"port {port} cannot be used here ({reason}): set MASTER_PORT to a free one")
    else:
        yield ok(f"{port} is free on {socket.gethostname()}")


def _is_here(address: str) -> bool:
    """Whether a socket of this machine can have the address."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_can_bind(family, host[0]) for family, _, _, _, host in found)


def _can_bind(family: int, host: object) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _find_obstacle(port: int) -> str | None:
    """Why nobody can listen at the port on all addresses, or None."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None
