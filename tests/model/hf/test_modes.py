"""The decoding modes have one set of names, and each has a decoder."""

from launch.quickstart import story
from model.hf.decoding import DECODERS
from model.hf.options import MODES


def test_modes_are_the_shipped_ones() -> None:
    assert tuple(DECODERS) == MODES
    assert set(story.CHAT_MODES) <= set(MODES)
