"""A rerun continues with the first phase that is not finished."""

from pathlib import Path

import pytest

from launch.quickstart.phases import Phase, module_command, run_phases


class Recorder:
    """Three phases a, b, c that write a file each; `fails` names one that stops half-way."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ran, self.fails = directory, [], ""

    def run(self) -> dict[str, float]:
        phases = [
            Phase(
                name,
                name,
                [self.directory / name],
                lambda name=name: self._work(name),
                resumes=name == "b",
            )
            for name in "abc"
        ]
        self.ran = []
        return run_phases(phases, self.directory / "phases.json", show=lambda text: None)

    def _work(self, name: str) -> None:
        self.ran.append(name)
        (self.directory / name).write_text((self.directory / name).read_text() + "+" if self.exists(name) else name)
        if name == self.fails:
            raise KeyboardInterrupt

    def exists(self, name: str) -> bool:
        return (self.directory / name).exists()


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_phases_run_in_order_and_once(recorder: Recorder) -> None:
    seconds = recorder.run()
    assert recorder.ran == ["a", "b", "c"]
    assert set(seconds) == {"a", "b", "c"}
    assert recorder.run() == seconds
    assert recorder.ran == []


def test_an_interrupted_phase_is_continued(recorder: Recorder) -> None:
    recorder.fails = "b"
    with pytest.raises(KeyboardInterrupt):
        recorder.run()
    recorder.fails = ""
    recorder.run()
    assert recorder.ran == ["b", "c"]
    assert (recorder.directory / "b").read_text() == "b+", "training continues from what it left"


def test_a_phase_that_cannot_be_continued_starts_over(recorder: Recorder) -> None:
    recorder.fails = "c"
    with pytest.raises(KeyboardInterrupt):
        recorder.run()
    recorder.fails = ""
    recorder.run()
    assert (recorder.directory / "c").read_text() == "c"


def test_a_missing_output_invalidates_everything_after_it(recorder: Recorder) -> None:
    recorder.run()
    (recorder.directory / "a").unlink()
    recorder.run()
    assert recorder.ran == ["a", "b", "c"]
    assert [(recorder.directory / name).read_text() for name in "abc"] == ["a", "b", "c"]


def test_a_command_is_a_phase_of_its_own_process(tmp_path: Path) -> None:
    command = module_command("timeit", "-n", 1, "-r", 1, f"open({str(tmp_path / 'made')!r}, 'w')")
    phase = Phase("made", "it", [tmp_path / "made"], command)
    assert set(run_phases([phase], tmp_path / "phases.json", show=lambda text: None)) == {"made"}
    assert (tmp_path / "made").exists()
