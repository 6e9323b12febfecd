"""Two hosts on one machine: network namespaces with an address each, and a cable that can be pulled. Needs root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """prefix: of a command that is to run there. device: its network device. address: of that device."""

    name: str
    prefix: tuple[str, ...]
    device: str
    address: str

    def pull_cable(self) -> None:
        """Let nothing arrive from now on, without anybody noticing."""
        self._ip("link", "set", self.device, "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        self._ip("link", "set", self.device, "up")

    def _ip(self, *words: str) -> None:
        subprocess.run([*self.prefix, "ip", *words], check=True)


def can_make_hosts() -> bool:
    """Return whether this process may make network namespaces."""
    if os.geteuid():
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two connected hosts, which exist until the block ends."""
    number = os.getpid() % 100000
    names = [f"host{side}_{number}" for side in "ab"]
    devices = [f"v{side}{number}" for side in "ab"]
    hosts = [
        Host(name, ("ip", "netns", "exec", name), device, f"10.77.0.{place}")
        for place, (name, device) in enumerate(zip(names, devices, strict=True), start=1)
    ]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", devices[1], "netns", names[1])
        for host in hosts:
            host._ip("address", "add", f"{host.address}/24", "dev", host.device)
            host._ip("link", "set", "lo", "up")
            host.plug_in()
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def two_addresses() -> tuple[Host, Host]:
    """Return two addresses of this machine, which needs no root. There is no cable to pull."""
    return Host("first", (), "lo", "127.0.0.2"), Host("second", (), "lo", "127.0.0.3")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
