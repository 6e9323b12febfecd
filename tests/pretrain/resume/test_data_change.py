"""Shares and sources may change on resume; what a source or a sequence holds only when asked to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.composition.compose import compose_run_config
from conf.system.errors import UserError
from model.checkpoint.layout import CheckpointManifest, load_checkpoint_manifest, save_checkpoint_manifest
from pretrain.resume.data_change import DataChange, compare_data, with_order
from pretrain.resume.start_point import StartPoint, build_manifest
from pretrain.run.run_data import RunData, count_samples, describe_blend, open_data
from pretrain.run.run_status import TrainState
from tests.helpers.toy_data import SEQUENCE_LENGTH, ToyData, tokens_of

SEEN = 40
STEP = Path("run/checkpoints/step_00000005")


class Run:
    """Opens the data of a run on two sources; `checkpoint` is what it saved after 40 samples."""

    def __init__(self, toy_data: ToyData, root: Path) -> None:
        self.toy_data, self.root = toy_data, root
        self.both = {"web": (toy_data.train, 3), "code": (toy_data.heldout, 1)}
        config = self.compose(self.both)
        state = TrainState(5, SEEN * SEQUENCE_LENGTH, SEEN)
        save_checkpoint_manifest(root, build_manifest(config, open_data(config), StartPoint(11), state, {}))
        self.checkpoint: CheckpointManifest = load_checkpoint_manifest(root)
        self.counts = dict(zip(self.sources, open_data(config).train.order.count_read(SEEN), strict=True))

    @property
    def sources(self) -> list[str]:
        """Names in the order of the blend."""
        return [source["name"] for source in self.checkpoint.data_position["sources"]]

    def open(self, blend: dict[str, tuple[Path, int]], *overrides: str) -> RunData:
        """Open the data of a later start."""
        return open_data(self.compose(blend, *overrides))

    def resume(self, blend: dict[str, tuple[Path, int]], *overrides: str) -> DataChange:
        """Compare the data of a later start with the checkpoint's."""
        return compare_data(self.open(blend, *overrides), self.checkpoint, STEP)

    def compose(self, blend, *overrides):
        sources = ", ".join(f"{name}: {{path: {path}, weight: {weight}}}" for name, (path, weight) in blend.items())
        where = [f"run.root={self.root}", "run.name=run", "stage=joint", tokens_of(10), "data.heldout=null"]
        return compose_run_config([*self.toy_data.overrides(), *where, f"data.train={{{sources}}}", *overrides])


@pytest.fixture(scope="module")
def run(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(toy_data, tmp_path_factory.mktemp("run"))


def read_on(change: DataChange) -> dict[str, int]:
    """Return the next sequence of every source, by name."""
    return {source.name: source.read for source in change.order.sources}


def test_the_same_data_go_on_as_they_were_whatever_they_are_called(run: Run) -> None:
    change = run.resume({"new_web": run.both["web"], "new_code": run.both["code"]})
    change.check(is_allowed=False)
    assert change.order.first_sample == 0
    assert list(change.describe()) == []


def test_changed_weights_need_no_permission_and_are_said(run: Run) -> None:
    change = run.resume({"web": (run.toy_data.train, 1), "code": (run.toy_data.heldout, 1)})
    change.check(is_allowed=False)
    assert read_on(change) == run.counts
    assert sum(run.counts.values()) == SEEN
    (line,) = change.describe()
    assert line.startswith(f"resume: a new blend begins at sample {SEEN}: ")
    assert f"web 75.0% -> 50.0%, from its sequence {run.counts['web']}" in line


def test_sources_may_come_and_go(run: Run) -> None:
    change = run.resume({"web": run.both["web"], "chats": (run.toy_data.train_chats, 1)})
    change.check(is_allowed=False)
    assert read_on(change) == {"web": run.counts["web"], "chats": 0, "code": run.counts["code"]}
    (line,) = change.describe()
    assert "chats new -> 25.0%, from its sequence 0" in line
    assert f"code left out after {run.counts['code']} sequences" in line


def test_other_content_under_a_known_name_is_refused_unless_asked_for(run: Run) -> None:
    change = run.resume({"web": run.both["web"], "code": (run.toy_data.train_chats, 1)})
    with pytest.raises(UserError, match=r"sources: code is \w+ then, \w+ now.*resume.allow_data_change=true"):
        change.check(is_allowed=False)
    change.check(is_allowed=True)
    order = change.order
    assert [source.read for source in order.live if source.name == "code"] == [0]


def test_a_blend_with_nothing_of_the_former_one_is_refused_unless_asked_for(run: Run) -> None:
    change = run.resume({"chats": (run.toy_data.train_chats, 1)})
    with pytest.raises(UserError, match="none of them now"):
        change.check(is_allowed=False)
    change.check(is_allowed=True)


@pytest.mark.parametrize("override", ["data.sequence_length=32", "data.isolate_documents=false", "train.seed=7"])
def test_what_makes_other_sequences_is_refused_unless_asked_for(run: Run, override: str) -> None:
    change = run.resume(run.both, override)
    with pytest.raises(UserError, match=r"resume\.allow_data_change=true"):
        change.check(is_allowed=False)
    change.check(is_allowed=True)
    assert any("sequences are others than before" in line for line in change.describe())


def test_shorter_sequences_go_on_after_the_same_share_of_the_epoch(run: Run) -> None:
    change = run.resume(run.both, "data.sequence_length=32")
    sizes = {source["name"]: source["sequences"] for source in run.checkpoint.data_position["sources"]}
    for source in change.order.live:
        assert source.sequences > sizes[source.name]
        share = run.counts[source.name] / sizes[source.name]
        assert 0 <= source.read - share * source.sequences < 1


def test_a_changed_blend_reads_what_its_order_says(run: Run) -> None:
    change = run.resume({"web": (run.toy_data.train, 1), "code": (run.toy_data.heldout, 1)})
    changed = with_order(change.data, change.order).train
    batch = changed.build_batch([SEEN, SEEN + 1])
    name, number = changed.locate(SEEN)
    assert number == run.counts[name]
    assert torch.equal(batch.tokens[:1], changed.sources[name].build_sequence(number).tokens)
    (epochs,) = {line for line in describe_blend(changed, SEEN) if line.startswith("web:")}
    assert f"{run.counts['web'] / changed.sources['web'].num_sequences:.3g} epochs" in epochs
    assert with_order(change.data, None) is change.data


def test_the_end_of_a_run_that_left_out_data_is_later(run: Run) -> None:
    config = run.compose(run.both)
    assert count_samples(config, TrainState()) == 10 * 8
    assert count_samples(config, TrainState(5, 5 * 8 * SEQUENCE_LENGTH, 40)) == 10 * 8
    assert count_samples(config, TrainState(5, 5 * 8 * SEQUENCE_LENGTH, 400)) == 400 + 5 * 8
    shorter = replace(config, train=replace(config.train, tokens=SEQUENCE_LENGTH))
    assert count_samples(shorter, TrainState(5, 5 * 8 * SEQUENCE_LENGTH, 40)) == 40
