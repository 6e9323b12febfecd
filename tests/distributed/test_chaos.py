"""A small part of `make chaos`, with kills that are chosen: a rank while it saves asynchronously, and a polite end."""

from pathlib import Path
from signal import Signals

import pytest

from tests.bench.chaos.__main__ import main
from tests.bench.chaos.compare import list_differences, load_curve
from tests.bench.chaos.corruption import flip
from tests.bench.chaos.job import Job, Start
from tests.bench.chaos.kill import Durations, strike
from tests.bench.chaos.plan import Kill, Moment, draw_kills
from tests.bench.chaos.watch import Phase
from tests.helpers.processes import train_many
from tests.helpers.toy_data import ToyData

STEPS = 14
DURATIONS = Durations(start=5.0, load=1.0, step=0.1, save=0.1, evaluation=0.3)


def test_killed_and_damaged_a_run_ends_as_if_nothing_had_been(toy_data: ToyData, tmp_path: Path) -> None:
    """SIGKILL during an asynchronous save, SIGTERM after six steps, then a flipped byte in the newest checkpoint."""
    quiet, job = (Job(toy_data, tmp_path, name, STEPS, "pp2") for name in ("quiet", "job"))
    train_many(2, [quiet.overrides(asynchronous=False)], tmp_path)
    hard = Kill(1, Signals.SIGKILL, Moment.save, 1, 0.5, asynchronous=True)
    polite = Kill(0, Signals.SIGTERM, Moment.step, 6, 0.5, asynchronous=False)
    outcomes = [strike(job, kill, DURATIONS) for kill in (hard, polite)]
    assert [outcome.bad for outcome in outcomes] == [(), ()]
    assert outcomes[0].phase is Phase.asynchronous_save

    newest = max((job.run_dir / "checkpoints").glob("step_????????"))
    flip(next(newest.glob("*.distcp")), 1000, 1)
    assert Start(job, asynchronous=False).launcher.wait(200) == 0
    assert f"{newest} is damaged" in (job.run_dir / "logs" / "rank_0.log").read_text()
    assert newest.with_name(newest.name + ".corrupt").exists()
    assert list_differences(quiet.run_dir, job.run_dir) == []
    assert sorted(load_curve(job.run_dir)) == sorted(load_curve(quiet.run_dir))


def test_the_same_seed_draws_the_same_kills() -> None:
    assert draw_kills(50, 7, 2) == draw_kills(50, 7, 2) != draw_kills(50, 8, 2)
    assert {kill.moment for kill in draw_kills(50, 7, 2)} == set(Moment)


@pytest.mark.slow
def test_ten_kills_and_thirty_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ["--folder", str(tmp_path / "chaos"), "--output", str(tmp_path / "chaos.json")]
    monkeypatch.setattr("sys.argv", ["chaos", "--kills", "10", "--seed", "3", "--flips", "30", *where])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0, (tmp_path / "chaos.json").read_text()
