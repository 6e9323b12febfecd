"""Draw the images of chats on a sheet: as the model sees them, with what is asked and answered."""

import io
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from conf.system.atomic import atomic_write_bytes
from conf.system.errors import UserError
from data_pipeline.batch import PlacedImage
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import Decoder
from data_pipeline.inspect.samples import PositionKind, Sample, describe_sample
from model.hf.image_loading import load_image

MOST_CARDS, CARDS_IN_LINE, MOST_PICTURES = 48, 4, 4
CARD_WIDTH, PICTURE_HEIGHT, MARGIN = 320, 200, 12  # pixels
FONT_PIXELS, LINE_PIXELS, CHARACTERS_IN_LINE, MOST_LINES = 13, 17, 42, 7
PAPER, FRAME = "#ffffff", "#d1d5db"
COLOURS = {PositionKind.prompt: "#4b5563", PositionKind.scored: "#047857"}
SIZE_COLOUR = "#9ca3af"
ROLES = ("system", "user", "assistant")  # lines that templates write


@dataclass(frozen=True)
class Card:
    """Holds a chat with images. title: where it is. pictures: its first ones. turns: kind and text of each part."""

    title: str
    pictures: list[Image.Image]
    turns: list[tuple[PositionKind, str]]


def collect_cards(dataset: TokenDataset, indices: Iterable[int], decoder: Decoder) -> list[Card]:
    """Return the chats with images in these sequences of a dataset, MOST_CARDS at most."""
    return list(islice((card for index in indices for card in _cards_of(dataset, index, decoder)), MOST_CARDS))


def _cards_of(dataset: TokenDataset, index: int, decoder: Decoder) -> Iterator[Card]:
    batch = dataset.build_sequence(index, index)
    sample = describe_sample(batch, decoder, None, dataset.form.sequence_length)
    documents = batch.document_ids[0].tolist()
    for number in sample.documents:
        images = [image for image in batch.images if documents[image.first] == number]
        if images:
            yield Card(_name(index, number, images), _open(images), list(_list_turns(sample, number)))


def _name(index: int, document: int, images: list[PlacedImage]) -> str:
    sizes = ", ".join(f"{height} x {width}" for height, width in (image.grid for image in images[:MOST_PICTURES]))
    more = f" and {len(images) - MOST_PICTURES} more" if len(images) > MOST_PICTURES else ""
    return f"sample {index}, document {document}: {sizes}{more}"


def _open(images: list[PlacedImage]) -> list[Image.Image]:
    return [load_image(image.stored.read()) for image in images[:MOST_PICTURES]]


def _list_turns(sample: Sample, document: int) -> Iterator[tuple[PositionKind, str]]:
    for span in sample.spans:
        if span.document == document and span.kind in COLOURS:
            text = "".join(chunk.text for chunk in span.chunks if not chunk.is_special)
            lines = [line for line in text.splitlines() if line.strip() and line.strip() not in ROLES]
            if lines:
                yield span.kind, "\n".join(lines)


def draw_sheet(cards: list[Card], path: Path) -> None:
    """Write a PNG with the cards side by side. Raises UserError if the file cannot be written."""
    lines = [cards[start : start + CARDS_IN_LINE] for start in range(0, len(cards), CARDS_IN_LINE)]
    heights = [max(map(_count_height, line)) for line in lines]
    width = MARGIN + CARDS_IN_LINE * (CARD_WIDTH + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(height + MARGIN for height in heights)), PAPER)
    y = MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, card in enumerate(line):
            _draw_card(sheet, card, MARGIN + column * (CARD_WIDTH + MARGIN), y, height)
        y += height + MARGIN
    png = io.BytesIO()
    sheet.save(png, "PNG")
    try:
        atomic_write_bytes(path, png.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _wrap(card: Card) -> Iterator[tuple[PositionKind, str]]:
    """Yield the lines of a card's text, MOST_LINES at most for each turn."""
    for kind, text in card.turns:
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, CHARACTERS_IN_LINE)]
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES - 1], "..."]
        yield from ((kind, line) for line in lines)


def _count_height(card: Card) -> int:
    return PICTURE_HEIGHT + LINE_PIXELS * (1 + len(list(_wrap(card)))) + 3 * MARGIN


def _draw_card(sheet: Image.Image, card: Card, x: int, y: int, height: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((x, y, x + CARD_WIDTH - 1, y + height - 1), outline=FRAME)
    share = (CARD_WIDTH - MARGIN) // len(card.pictures) - MARGIN
    for number, picture in enumerate(card.pictures):
        shown = _fit(picture, share, PICTURE_HEIGHT)
        left = x + MARGIN + number * (share + MARGIN)
        sheet.paste(shown, (left + (share - shown.width) // 2, y + MARGIN + (PICTURE_HEIGHT - shown.height) // 2))
    y += PICTURE_HEIGHT + 2 * MARGIN
    pen.text((x + MARGIN, y), card.title, SIZE_COLOUR, _load_font())
    for kind, line in _wrap(card):
        y += LINE_PIXELS
        pen.text((x + MARGIN, y), line, COLOURS[kind], _load_font())


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return a picture that fits, enlarged by whole pixels or shrunk."""
    scale = min(width / picture.width, height / picture.height)
    scale = float(int(scale)) if scale >= 1 else scale
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


@cache
def _load_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_PIXELS)
