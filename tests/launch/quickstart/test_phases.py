"""A rerun continues with the first phase that is not finished."""

from pathlib import Path

import pytest

from launch.quickstart.phases import Phase, run_phases


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
                keeps_partial_outputs=name == "b",
            )
            for name in "abc"
        ]
        self.ran = []
        return run_phases(phases, self.directory / "phases.json", say=lambda text: None)

    def _phase(self, name: str) -> Phase:
        return Phase(name, name, [self.directory / name], lambda: self._work(name), keeps_partial_outputs=name == "b")

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
