"""An override of the drafter says so; everything else is for the training stages."""

from launch.quickstart.overrides import split_overrides


def test_overrides_reach_the_command_they_are_for() -> None:
    split = split_overrides(["train.tokens=1e5", "drafter.train.steps=10", "drafter.adapter.rank=8"])
    assert split.stages == ["train.tokens=1e5"]
    assert split.drafter == ["train.steps=10", "adapter.rank=8"]
