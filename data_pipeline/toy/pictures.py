"""Draw pictures and ask about them: coloured shapes, where they are, how many, and short words.

A picture is a board of squares as wide as a feature of the vision tower (28 pixels), with at most one shape in each, so
that a toy tower learns them on two CPU cores. Every response needs the picture: by guessing, one in CHANCE is right.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from conf.system.atomic import atomic_directory, atomic_file
from data_pipeline.toy.corpus import write_jsonl

SQUARE = 28  # pixels
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 20),
    "black": (20, 20, 20),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("none", "one", "two", "three", "four", "five")
WORDS = ("cat", "dog", "sun", "map", "key", "box", "jet", "owl")
CORNERS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}
HEIGHTS, WIDTHS = range(2, 5), range(2, 6)  # squares of a board
WORD_BOARD = (2, 3)  # squares of a picture with a word: height and width
QUESTIONS_NAME = "questions.jsonl"
FONT, FONT_PIXELS = "DejaVuSans-Bold.ttf", 30

type Place = tuple[int, int]  # row and column
type Colour = tuple[int, int, int]


@dataclass(frozen=True)
class PictureQuestion:
    """Holds a question about a picture.

    kind: of the question, one of KINDS. picture: a PNG file. response: the one right response.
    """

    kind: str
    picture: bytes
    question: str
    response: str

    def to_record(self) -> dict[str, Any]:
        """Return the record in FineVision's form, with the kind beside it."""
        turn = {"user": self.question, "assistant": self.response}
        return {"images": [{"bytes": self.picture, "path": None}], "texts": [turn], "kind": self.kind}


@dataclass(frozen=True)
class PictureSplit:
    """Holds questions to train on, and questions about other pictures to evaluate with."""

    train: list[PictureQuestion]
    heldout: list[PictureQuestion]


class _Board:
    """Draws shapes on a picture of height x width squares."""

    def __init__(self, draw: random.Random, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._random = draw
        shade = draw.randrange(225, 256)
        self.image = Image.new("RGB", (width * SQUARE, height * SQUARE), (shade, shade, shade))
        self._pen = ImageDraw.Draw(self.image)

    @property
    def places(self) -> list[Place]:
        """Return all squares."""
        return [(row, column) for row in range(self.height) for column in range(self.width)]

    def corner(self, name: str) -> Place:
        """Return the square in a corner."""
        row, column = CORNERS[name]
        return row % self.height, column % self.width

    def put(self, place: Place, shape: str, colour: str) -> None:
        """Draw a shape into a square, not always of the same size nor in its very middle."""
        row, column = place
        x = (column + 0.5) * SQUARE + self._random.randint(-2, 2)
        y = (row + 0.5) * SQUARE + self._random.randint(-2, 2)
        _SHAPES[shape](self._pen, x, y, self._random.randint(9, 11), COLOURS[colour])

    def write(self, word: str, colour: str) -> None:
        """Write a word across the picture."""
        width, height = self.image.size
        middle = (width // 2 + self._random.randint(-3, 3), height // 2 + self._random.randint(-3, 3))
        self._pen.text(middle, word, COLOURS[colour], _load_font(), anchor="mm")

    def to_png(self) -> bytes:
        """Return the picture as a PNG file."""
        buffer = BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


@cache
def _load_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", FONT), FONT_PIXELS)


def _draw_circle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: Colour) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _draw_square(pen: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: Colour) -> None:
    pen.rectangle((x - radius, y - radius, x + radius, y + radius), colour)


def _draw_triangle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: Colour) -> None:
    pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], colour)


def _draw_cross(pen: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: Colour) -> None:
    pen.line((x - radius, y, x + radius, y), colour, 6)
    pen.line((x, y - radius, x, y + radius), colour, 6)


_SHAPES = {"circle": _draw_circle, "square": _draw_square, "triangle": _draw_triangle, "cross": _draw_cross}


def _choose_board(draw: random.Random) -> _Board:
    return _Board(draw, draw.choice(HEIGHTS), draw.choice(WIDTHS))


def _ask_corner(draw: random.Random) -> PictureQuestion:
    board, asked = _choose_board(draw), draw.choice(list(CORNERS))
    response = ""
    for name in CORNERS:
        shape, colour = draw.choice(SHAPES), draw.choice(list(COLOURS))
        board.put(board.corner(name), shape, colour)
        if name == asked:
            response = f"a {colour} {shape}"
    return PictureQuestion("corner", board.to_png(), f"What is in the {asked} corner?", response)


def _ask_where(draw: random.Random) -> PictureQuestion:
    board, names = _choose_board(draw), list(CORNERS)
    draw.shuffle(names)
    shapes = draw.sample(SHAPES, len(names))
    colours = [draw.choice(list(COLOURS)) for _ in names]
    for name, shape, colour in zip(names, shapes, colours, strict=True):
        board.put(board.corner(name), shape, colour)
    return PictureQuestion("where", board.to_png(), f"Find the {shapes[0]}.", f"{colours[0]}, {names[0]}")


def _ask_count(draw: random.Random) -> PictureQuestion:
    board, asked = _choose_board(draw), draw.choice(SHAPES)
    others = [shape for shape in SHAPES if shape != asked]
    count = draw.randrange(min(len(NUMBERS), len(board.places) + 1))
    places = draw.sample(board.places, draw.randint(count, len(board.places)))
    for number, place in enumerate(places):
        board.put(place, asked if number < count else draw.choice(others), draw.choice(list(COLOURS)))
    return PictureQuestion("count", board.to_png(), f"How many {_plural(asked)} are there?", NUMBERS[count])


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _ask_word(draw: random.Random) -> PictureQuestion:
    board, word = _Board(draw, *WORD_BOARD), draw.choice(WORDS)
    colour = draw.choice(list(COLOURS))
    board.write(word, colour)
    return PictureQuestion("word", board.to_png(), "Read the word.", f"{word}, in {colour}")


KINDS: dict[str, Callable[[random.Random], PictureQuestion]] = {
    "corner": _ask_corner,
    "where": _ask_where,
    "count": _ask_count,
    "word": _ask_word,
}
# One in so many responses is right by guessing, with all that the question says.
CHANCE = {
    "corner": len(COLOURS) * len(SHAPES),
    "where": len(COLOURS) * len(CORNERS),
    "count": len(NUMBERS),
    "word": len(WORDS) * len(COLOURS),
}


def ask_about_pictures(seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[PictureQuestion]:
    """Yield questions about new pictures without end, the kinds in turn; the same ones for the same seed."""
    draw = random.Random(seed)
    while True:
        yield from (KINDS[kind](draw) for kind in kinds)


def load_picture_questions(num_train: int, num_heldout: int, seed: int = 0) -> PictureSplit:
    """Return questions to train on and to evaluate with; no picture comes twice."""
    heldout: list[PictureQuestion] = []
    train: list[PictureQuestion] = []
    seen: set[bytes] = set()
    for asked in ask_about_pictures(seed):
        if asked.picture in seen:
            continue
        seen.add(asked.picture)
        if len(heldout) < num_heldout:
            heldout.append(asked)
        elif len(train) < num_train:
            train.append(asked)
        else:
            break
    return PictureSplit(train, heldout)


def write_parquet(questions: list[PictureQuestion], path: Path | str) -> None:
    """Write the questions in FineVision's form; the file appears complete or not at all."""
    table = pa.Table.from_pylist([asked.to_record() for asked in questions], _SCHEMA)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(table, file, row_group_size=256)


def write_picture_folder(questions: list[PictureQuestion], folder: Path | str) -> Path:
    """Write the pictures as files below a new `folder`, and questions.jsonl whose messages name them; return its path.

    Raises UserError if the folder exists and is not empty.
    """
    folder = Path(folder)
    with atomic_directory(folder) as partial:
        names = [f"{number:05d}.png" for number in range(len(questions))]
        for name, asked in zip(names, questions, strict=True):
            (partial / name).write_bytes(asked.picture)
        write_jsonl(map(_name_picture, questions, names), partial / QUESTIONS_NAME)
    return folder / QUESTIONS_NAME


def _name_picture(asked: PictureQuestion, name: str) -> dict[str, Any]:
    content = [{"type": "image", "path": name}, {"type": "text", "text": asked.question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": asked.response}]
    return {"messages": messages, "kind": asked.kind}


_SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string()})),
        "kind": pa.string(),
    }
)
