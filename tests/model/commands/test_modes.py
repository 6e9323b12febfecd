"""The names of modes that command lines know without torch."""

from launch.quickstart import story
from model.commands.modes import MODES
from model.hf import decoding_nemotron_labs_diffusion as shipped


def test_modes_are_the_shipped_ones() -> None:
    assert shipped.MODES == MODES
    assert set(story.CHAT_MODES) <= set(MODES)
