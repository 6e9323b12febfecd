"""Whatever ends a run, the same call later gives the bytes of a run that nothing disturbed."""

import errno
import fcntl
import gzip
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.system.errors import UserError
from data_pipeline.prepare.identity import lock_directory

ROOT = Path(__file__).resolve().parents[3]
SHARD_BYTES = 20_000


@pytest.fixture
def corpus(workshop, records):
    """Write some 25 shards of plain and as many of compressed text: about a second of work."""
    plain = workshop.write("a.jsonl", [{"text": f"{i} {records[i % 40]['text'] * 4}"} for i in range(600)])
    workshop.write("b.jsonl.gz", gzip.compress(plain.read_bytes()))
    return workshop


def command(workshop, output: Path, workers: int = 2) -> list[str]:
    settings = [
        f"data.tokenizer={workshop.tokenizer_dir}",
        f"data.train.text.path={output}",
        f"data.train.text.input.files={workshop.folder / 'in'}",
        "data.train.text.input.records=all",
        "~data.heldout.text",
        f"data.prepare.shard_bytes={SHARD_BYTES}",
        f"data.prepare.workers={workers}",
    ]
    return [sys.executable, "-m", "data_pipeline.prepare", "data=text", *settings]


def start(workshop, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(workshop, output),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts its background jobs deaf to Ctrl-C, and what they start would be, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_shards(process: subprocess.Popen, output: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(output.glob(".work/shard_*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def undisturbed(workshop, tree) -> dict[str, bytes]:
    output = workshop.folder / "undisturbed"
    workshop.prepare(output, shard_bytes=SHARD_BYTES, workers=2)
    content = tree(output)
    assert not any("work" in name or "partial" in name for name in content)
    return content


def children_of(process: subprocess.Popen) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def test_a_killed_run_continues_to_the_same_bytes(corpus, tree) -> None:
    for count in (1, 12, 24):
        process = start(corpus, corpus.output)
        wait_for_shards(process, corpus.output, count)
        process.kill()
        process.wait()
    saved = {path.name: path.stat().st_mtime_ns for path in corpus.output.glob(".work/shard_*.json")}
    bins = {name: (corpus.output / name.replace("json", "bin")).stat().st_mtime_ns for name in saved}
    corpus.prepare(shard_bytes=SHARD_BYTES, workers=3)
    assert bins == {name: (corpus.output / name.replace("json", "bin")).stat().st_mtime_ns for name in saved}
    assert tree(corpus.output) == undisturbed(corpus, tree)


def test_a_killed_worker_ends_the_run_with_a_message(corpus, tree) -> None:
    process = start(corpus, corpus.output)
    wait_for_shards(process, corpus.output, 5)
    os.kill(children_of(process)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2, output
    assert "died (exit status -9" in output
    assert not list(corpus.output.glob(".*.partial"))
    corpus.prepare(shard_bytes=SHARD_BYTES)
    assert tree(corpus.output) == undisturbed(corpus, tree)


def test_ctrl_c_ends_the_run_and_its_workers(corpus) -> None:
    process = start(corpus, corpus.output)
    wait_for_shards(process, corpus.output, 1)  # the rest takes longer than a signal, on any machine
    workers = children_of(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert output.strip().endswith("interrupted: the same command continues from here")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list(corpus.output.glob(".*.partial"))


def test_workers_do_not_outlive_a_killed_run(corpus) -> None:
    process = start(corpus, corpus.output)
    wait_for_shards(process, corpus.output, 5)
    workers = children_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}/cmdline").exists() and is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_full_disk_is_a_message_and_the_run_continues_when_there_is_room(workshop, records, tree) -> None:
    workshop.write("a.jsonl", [{"text": record["text"] * 100} for record in records])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # workers inherit it: a write beyond it fails
    try:
        with pytest.raises(UserError, match=r"cannot write .*shard_.*finished shards stay"):
            workshop.prepare(shard_bytes=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(workshop.output.glob(".*.partial"))
    workshop.prepare(shard_bytes=1_000_000)
    undisturbed_output = workshop.folder / "undisturbed"
    workshop.prepare(undisturbed_output, shard_bytes=1_000_000)
    assert tree(workshop.output) == tree(undisturbed_output)


def test_two_runs_do_not_share_a_folder(workshop, records) -> None:
    workshop.write("a.jsonl", records)
    with lock_directory(workshop.output), pytest.raises(UserError, match="another run of prepare"):
        workshop.prepare()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(workshop, records, monkeypatch, caplog, error) -> None:
    def refuse(file, operation):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    workshop.write("a.jsonl", records)
    assert workshop.prepare().manifest.documents == len(records)
    assert "cannot be locked" in caplog.text


def test_a_path_that_cannot_be_written_is_named(workshop, records) -> None:
    workshop.write("a.jsonl", records)
    workshop.output.write_text("a file")
    with pytest.raises(UserError, match=r"out cannot be written"):
        workshop.prepare()
