"""Pictures and questions follow from the seed, responses from the picture, and training reads both."""

from collections import Counter
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.pictures import (
    CHANCE,
    COLOURS,
    CORNERS,
    KINDS,
    SHAPES,
    SQUARE,
    ask_about_pictures,
    load_picture_questions,
    write_parquet,
    write_picture_folder,
)

NUMBER = 400


def test_the_same_seed_asks_the_same_and_another_one_something_else() -> None:
    first, again, other = (list(islice(ask_about_pictures(seed), 20)) for seed in (3, 3, 4))
    assert first == again != other


def test_no_picture_comes_twice_and_held_out_ones_are_new() -> None:
    split = load_picture_questions(NUMBER, NUMBER // 4)
    pictures = [asked.picture for asked in (*split.train, *split.heldout)]
    assert (len(split.train), len(split.heldout)) == (NUMBER, NUMBER // 4)
    assert len(set(pictures)) == len(pictures)
    assert set(Counter(asked.kind for asked in split.heldout)) == set(KINDS) == set(CHANCE)


def test_pictures_are_small_boards_of_whole_features() -> None:
    sizes = {Image.open(BytesIO(asked.picture)).size for asked in islice(ask_about_pictures(0), NUMBER)}
    assert all(width % SQUARE == height % SQUARE == 0 for width, height in sizes)
    assert min(sizes) >= (56, 56) and max(map(max, sizes)) <= 140 and len(sizes) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_about_as_hard_to_guess_as_is_said(kind: str) -> None:
    responses = Counter(asked.response for asked in islice(ask_about_pictures(1, (kind,)), 2000))
    assert len(responses) == CHANCE[kind]
    assert max(responses.values()) < 2 * 2000 / CHANCE[kind]


def test_what_is_said_to_be_in_a_corner_is_there() -> None:
    for asked in islice(ask_about_pictures(2, ("corner",)), 100):
        image = Image.open(BytesIO(asked.picture))
        name = next(name for name in CORNERS if name in asked.question)
        row, column = CORNERS[name]
        left = 0 if column == 0 else image.width - SQUARE
        top = 0 if row == 0 else image.height - SQUARE
        square = image.crop((left, top, left + SQUARE, top + SQUARE))
        _, colour, shape = asked.response.split()
        colours = Counter(map(tuple, np.array(square).reshape(-1, 3).tolist()))
        assert COLOURS[colour] in dict(colours.most_common(2)) and shape in SHAPES


def test_both_forms_on_disk_become_the_same_data(tmp_path: Path, image_tokenizer_dir: Path) -> None:
    train = load_picture_questions(40, 0).train
    write_parquet(train, tmp_path / "questions.parquet")
    lines = write_picture_folder(train, tmp_path / "folder")
    settings = PrepareConfig(workers=1, chat_template="chatml")
    data = DataConfig(tokenizer=str(image_tokenizer_dir), prepare=settings)
    hashes = set()
    for path, column in ((tmp_path / "questions.parquet", "texts"), (lines, "messages")):
        input_ = InputConfig(kind=DocumentKind.image_chat, files=str(path), column=column)
        manifest = prepare_source("toy", SourceConfig(path=str(tmp_path / column), input=input_), data)
        assert (manifest.documents, manifest.images, manifest.fixed_images) == (40, 40, {})
        hashes.add(manifest.sha256)
    assert len(hashes) == 1
