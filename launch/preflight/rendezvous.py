"""Check the host and port at which the ranks meet."""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from conf.system.errors import UserError
from launch.preflight.runner import Finding, TrainingJob

TORCHRUN_PORT = 29500  # torchrun's default
SLURM_PORTS = 15000  # as in launch/rank.sh: both the first port and the number of ports; the job's id selects one
ANY_PORT = 0


@dataclass(frozen=True)
class Rendezvous:
    """Says where the ranks of a job meet.

    variable: what to set to change the port. is_certain: False where launch/local.sh would take any free port.
    """

    address: str
    port: int
    variable: str
    is_certain: bool = True


def check_ports(job: TrainingJob) -> Iterator[Finding]:
    """Check that the port is free, if the ranks meet on this machine."""
    rendezvous = find_rendezvous(os.environ)
    if rendezvous.port == ANY_PORT:
        yield Finding.ok(f"any free port on {rendezvous.address}")
    elif not _is_here(rendezvous.address):
        yield Finding.warning(
            f"not checked: the ranks meet at {rendezvous.address}:{rendezvous.port}, which is another machine"
        )
    elif (reason := _find_obstacle(rendezvous.port)) is None:
        yield Finding.ok(f"{rendezvous.port} is free on {socket.gethostname()}")
    elif rendezvous.is_certain:
        yield Finding.failed(
            f"port {rendezvous.port} cannot be used here ({reason}): set {rendezvous.variable} to a free one"
        )
    else:
        yield Finding.warning(
            f"port {rendezvous.port}, torchrun's default, cannot be used here ({reason}): launch/local.sh takes "
            f"another one; for torchrun set {rendezvous.variable}"
        )


def find_rendezvous(environment: Mapping[str, str]) -> Rendezvous:
    """Return the meeting point that launch/rank.sh, launch/local.sh or torchrun would choose, in this order.

    Raises:
        UserError: A variable does not hold a port.
    """
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
        raise UserError(f"{variable} is {text!r}, not a port from 0 to 65535")
    return int(text)


def _is_here(address: str) -> bool:
    """Return whether a socket of this machine can be bound to the address."""
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
    """Return why nobody can listen at the port on all addresses, or None."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            probe.bind(("", port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None
