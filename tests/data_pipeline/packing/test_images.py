"""An image is used as a whole or not at all, wherever a sequence ends."""

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import OverlongChat
from conf.system.errors import UserError
from data_pipeline.batch import Batch, stack_batches
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing.form import SequenceForm
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.references import ImageReferences
from model.hf.image_tokens import check_image_tokens, count_image_tokens
from tests.helpers.pictures import ImageWorkshop, ask, make_picture

SIZES = [(28, 28), (56, 84), (112, 28), (140, 84), (84, 112)]
PARTS = [
    {"type": "image", "base64": base64.b64encode(make_picture(width, height, seed)).decode()}
    for seed, (width, height) in enumerate(SIZES)
]


def write_chats(workshop: ImageWorkshop) -> None:
    """Write chats of one to six turns whose prompts have up to three images between their words."""
    generator = np.random.default_rng(0)
    records = []
    for number in range(60):
        messages: list[dict[str, Any]] = []
        for turn in range(int(generator.integers(1, 7))):
            chosen = [PARTS[i] for i in generator.integers(0, len(PARTS), generator.integers(0, 4))]
            words = "It is green and it shows things. " * int(generator.integers(1, 4))
            content = [item for part in chosen for item in (part, f" and {number}")]
            messages += ask(f"What is picture {turn}?", *content, response=words)
        records.append({"messages": messages})
    workshop.write_lines(records)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, image_tokenizer_dir: Path) -> Path:
    """Prepare the chats; tests must not write to their folder."""
    workshop = ImageWorkshop(tmp_path_factory.mktemp("pictures"), image_tokenizer_dir)
    write_chats(workshop)
    assert workshop.prepare(shard_bytes=1_000_000).skipped == {}
    assert len(load_manifest(workshop.output).shards) > 4
    return workshop.output


@pytest.fixture
def own(prepared: Path, tmp_path: Path) -> Path:
    """Copy the data for a test that may break them."""
    return Path(shutil.copytree(prepared, tmp_path / "own"))


def check_batch(batch: Batch) -> int:
    """Check that a batch has exactly the tokens of its images, where they are said to be; return their number."""
    for sequence in range(len(batch.tokens)):
        tokens = batch.tokens[sequence].numpy()
        images = [image for image in batch.images if image.sequence == sequence]
        check_image_tokens(tokens, [image.grid for image in images])
        for image in images:
            place = slice(image.first, image.first + count_image_tokens(image.grid))
            check_image_tokens(tokens[place], [image.grid])
            assert not batch.loss_mask[sequence, place].any() and not batch.block_padding[sequence, place].any()
            assert len(batch.document_ids[sequence, place].unique()) == 1
    return len(batch.images)


@pytest.mark.parametrize("overlong", list(OverlongChat))
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("length", [64, 96, 200, 1024])
def test_no_image_is_cut(prepared: Path, length: int, alignment: int, overlong: OverlongChat) -> None:
    form = SequenceForm(length, 8, alignment, overlong_chats=overlong)
    dataset = TokenDataset(prepared, form, seed=0)
    batch = stack_batches([dataset.build_sequence(number) for number in range(dataset.num_sequences)])
    assert check_batch(batch) == dataset.counts.images
    assert sum(count_image_tokens(image.grid) for image in batch.images) == dataset.counts.image_tokens
    everything = load_manifest(prepared).images
    if length == 1024:
        assert dataset.counts.images == everything and not dataset.counts.truncated_chats
    else:
        assert 0 < dataset.counts.images < everything
        assert bool(dataset.counts.truncated_chats) == (overlong is OverlongChat.truncate)


def test_counts_survive_on_disk(prepared: Path) -> None:
    form = SequenceForm(200, 8, 8)
    assert TokenDataset(prepared, form, 0).counts == TokenDataset(prepared, form, 1).counts


def test_pictures_are_read_where_the_folder_is_now(own: Path, tmp_path: Path) -> None:
    moved = own.rename(tmp_path / "moved")
    batch = TokenDataset(moved, SequenceForm(1024, 8, 8), seed=0).build_sequence(0)
    known = {base64.b64decode(part["base64"]) for part in PARTS}
    assert batch.images and all(image.stored.read() in known for image in batch.images)


def test_changed_references_are_refused(own: Path) -> None:
    form, path = SequenceForm(1024, 8, 8), min(own.glob("*.references"))
    TokenDataset(own, form, seed=0)
    content = bytearray(path.read_bytes())
    content[-8:-4] = (9).to_bytes(4, "little")  # the height of the last image
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is not what .* describes"):
        TokenDataset(own, form, seed=0)
    dataset = TokenDataset(own, form, seed=0, checks_files=False)  # as all processes but the first
    with pytest.raises(UserError, match="of sizes that do not fit them: the data were changed"):
        for number in range(dataset.num_sequences):
            dataset.build_sequence(number)


def test_incomplete_and_missing_references_are_refused(own: Path) -> None:
    path = min(own.glob("*.references"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name} is no complete list of images"):
        ImageReferences(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{path.name} is no complete list of images"):
        ImageReferences(path)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} does not exist"):
        ImageReferences(path)
    with pytest.raises(UserError, match=rf"{path.name} does not exist, but .* lists it"):
        TokenDataset(own, SequenceForm(1024, 8, 8), seed=0)
