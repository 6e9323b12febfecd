"""One run on two hosts: launch/local.sh on each, torchrun's rendezvous; one is cut off, both are started again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.torchrun import SECONDS_ALONE
from tests.bench.chaos.compare import load_curve
from tests.helpers.hosts import Host, can_make_hosts, two_addresses, two_hosts
from tests.helpers.processes import ROOT, kill_tree, load_lines, rank_environment, train_many
from tests.helpers.toy_data import ToyData, tokens_of

pytestmark = pytest.mark.slow

STEPS, TIMEOUT_SECONDS = 60, 18.0
PORT = 29533


@pytest.fixture(params=["namespaces", "addresses"])
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Yield network namespaces where there is root, else two addresses of the loopback device."""
    if request.param == "addresses":
        yield two_addresses()
        return
    if not can_make_hosts():
        pytest.skip("network namespaces need root: only two loopback addresses are tested")
    with two_hosts() as pair:
        yield pair


def overrides(data: ToyData, root: Path, name: str) -> list[str]:
    where = [f"run.root={root}", f"run.name={name}", "stage=joint", "parallel=single", tokens_of(STEPS)]
    often = ["checkpoint.every_steps=5", f"runtime.timeout_minutes={TIMEOUT_SECONDS / 60}"]
    return [*data.overrides(), *where, *often]


def start(host: Host, meeting: Host, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start launch/local.sh on a host, as a user types it."""
    environment = {
        **rank_environment(),
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"{meeting.address}:{PORT}",
        "LOCAL_ADDR": host.address,
        "GLOO_SOCKET_IFNAME": host.device,
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [*host.prefix, str(ROOT / "launch/local.sh"), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_both(hosts: tuple[Host, Host], arguments: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    return [start(host, hosts[0], arguments, folder / f"{host.name}.txt") for host in hosts]


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or not any(
        line["step"] >= step for line in load_lines(run_dir, "checkpoint")
    ):
        assert all(process.poll() is None for process in processes), "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_one_host_cut_off_the_other_ends_and_both_resume(
    hosts: tuple[Host, Host], toy_data: ToyData, tmp_path: Path
) -> None:
    train_many(2, [overrides(toy_data, tmp_path, "whole")], tmp_path)
    arguments, run_dir = overrides(toy_data, tmp_path, "run"), tmp_path / "run"
    processes = start_both(hosts, arguments, tmp_path)
    try:
        wait_for_step(run_dir, 10, processes)
        began = time.monotonic()
        if hosts[0].prefix:
            hosts[1].pull_cable()
        else:
            os.killpg(processes[1].pid, signal.SIGKILL)
        # Collectives have whole minutes in megatron-core's groups: one, here.
        assert processes[0].wait(60 + TIMEOUT_SECONDS) == 1
        print(f"the host that stayed ended after {time.monotonic() - began:.1f} s")
        assert processes[1].wait(SECONDS_ALONE + TIMEOUT_SECONDS) != 0
        print(f"the other one after {time.monotonic() - began:.1f} s")
        if hosts[0].prefix:
            hosts[1].plug_in()
        again = start_both(hosts, arguments, tmp_path)
        processes += again
        assert [process.wait(200) for process in again] == [0, 0], (tmp_path / f"{hosts[0].name}.txt").read_text()
    finally:
        for process in processes:
            kill_tree(process.pid)
    assert load_curve(run_dir) == load_curve(tmp_path / "whole")
