import re
from io import StringIO

import pytest
from rich.console import Console

from data_pipeline.inspect.decode import IdDecoder
from data_pipeline.inspect.render import TIMES, Painter, make_visible
from data_pipeline.inspect.samples import describe_sample
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from tests.helpers.packed import pack_chats

NOISE = NoiseSource(seed=3, stage="joint", split="train", epsilon=1e-3)


def show(in_colour: bool) -> str:
    batch = pack_chats([[[13, 9], [5, 17]]], SequenceForm(64, 8, 8))
    sample = describe_sample(batch, IdDecoder(), NOISE, num_shown=64)
    file = StringIO()
    console = Console(
        file=file, width=80, highlight=False, force_terminal=in_colour, color_system="standard" if in_colour else None
    )
    for text in Painter(in_colour, is_chat=True).sample(sample):
        console.print(text, overflow="fold")
    return file.getvalue()


def test_plain_output_marks_everything_without_escapes() -> None:
    lines = show(in_colour=False)
    assert "\x1b" not in lines
    assert max(map(len, lines.splitlines())) <= 80
    assert [line for line in lines.splitlines() if line.startswith(("━━ document", "── "))] == [
        next(line for line in lines.splitlines() if "document 0," in line),
        "── prompt",
        "── response",
        next(line for line in lines.splitlines() if "document 1," in line),
        "── prompt",
        "── response",
    ]
    assert f"·{TIMES}3" in lines and f"«2{TIMES}7 " in lines
    assert lines.count("⟦") == lines.count("⟧") > 0


def test_colours_say_the_same_without_marks() -> None:
    coloured = show(in_colour=True)
    assert "\x1b[7;31m" in coloured and "\x1b[32m" in coloured and "\x1b[33m" in coloured
    assert not set("⟦⟧«»") & set(coloured)
    words = re.sub(r"\x1b\[[0-9;]*m", "", coloured).split()
    assert words == re.sub("[⟦⟧«»]", "", show(in_colour=False)).split()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\n", "a↵\n"), ("\t", "⇥   "), ("\x1b[31m", "␛[31m"), ("\x7f\u202e", "\\u007f\\u202e"), ("é🙂", "é🙂")],
)
def test_nothing_in_a_text_can_move_the_cursor(text: str, shown: str) -> None:
    assert make_visible(text) == shown
