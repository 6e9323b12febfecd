"""The port at which ranks find each other."""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from conf.system.errors import UserError
from launch.preflight.findings import Finding, failed, ok, warning
from launch.preflight.subject import Subject

TORCHRUN_PORT = 29500  # torchrun's default
SLURM_PORTS = 15000  # as in launch/rank.sh: that many, from this number on, by the job's number
ANY_PORT = 0


@dataclass(frozen=True)
class Rendezvous:
    """variable: what to set to change the port. is_certain: False where launch/local.sh would take any free port."""

    address: str
    port: int
    variable: str
    is_certain: bool = True


def check_ports(subject: Subject) -> Iterator[Finding]:
    """Free on this machine, if this machine is where the ranks meet."""
    meeting = find_rendezvous(os.environ)
    if meeting.port == ANY_PORT:
        yield ok(f"any free port on {meeting.address}")
    elif not _is_here(meeting.address):
        yield warning(f"not checked: the ranks meet at {meeting.address}:{meeting.port}, which is another machine")
    elif (reason := _find_obstacle(meeting.port)) is None:
        yield ok(f"{meeting.port} is free on {socket.gethostname()}")
    elif meeting.is_certain:
        yield failed(f"port {meeting.port} cannot be used here ({reason}): set {meeting.variable} to a free one")
    else:
        yield warning(
            f"port {meeting.port}, torchrun's default, cannot be used here ({reason}): launch/local.sh takes another "
            f"one; for torchrun set {meeting.variable}"
        )


def find_rendezvous(environment: Mapping[str, str]) -> Rendezvous:
    """As launch/rank.sh, launch/local.sh and torchrun choose it, in this order. Raises UserError for no port."""
    address = environment.get("MASTER_ADDR", "localhost")
    if "MASTER_PORT" in environment:
        return Rendezvous(address, _read_port("MASTER_PORT", environment["MASTER_PORT"]), "MASTER_PORT")
    if "SLURM_JOB_ID" in environment:
        number = _read_port("SLURM_JOB_ID", environment["SLURM_JOB_ID"], largest=None)
        return Rendezvous(address, SLURM_PORTS + number % SLURM_PORTS, "MASTER_PORT")
    if "RDZV_ENDPOINT" in environment:
        host, _, port = environment["RDZV_ENDPOINT"].rpartition(":")
        return Rendezvous(host, _read_port("RDZV_ENDPOINT", port), "RDZV_ENDPOINT")
    return Rendezvous(address, TORCHRUN_PORT, "MASTER_PORT", is_certain=False)


def _read_port(variable: str, text: str, largest: int | None = (1 << 16) - 1) -> int:
    if not text.isdecimal() or (largest is not None and int(text) > largest):
        raise UserError(f"{variable} does not give a number from 0 to 65535 as port, but {text!r}")
    return int(text)


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
