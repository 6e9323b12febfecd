"""Images of a batch are decoded in threads, those that were chosen, and what is wrong with one is an error."""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conf.system.errors import UserError
from data_pipeline.batch import Batch, PlacedImage, stack_batches
from data_pipeline.images.decode import ImageDecoder
from data_pipeline.packing.form import SequenceForm
from data_pipeline.storage.image_file import StoredImage
from model.hf.image_processing_nemotron_labs_diffusion_vlm import encode_image
from tests.helpers.packed import pack_chats

SIZES = [(28, 28), (40, 30), (56, 84)]
GRIDS = [(1, 1), (2, 2), (3, 2)]


def choose_all(images: Sequence[PlacedImage]) -> range:
    return range(len(images))


@pytest.fixture
def images(tmp_path: Path) -> tuple[PlacedImage, ...]:
    """Store three pictures end to end in one file."""
    placed, stream = [], b""
    for number, (size, grid) in enumerate(zip(SIZES, GRIDS, strict=True)):
        values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        data = buffer.getvalue()
        stored = StoredImage(tmp_path / "a.images", len(stream), len(data), hashlib.sha256(data).hexdigest())
        placed.append(PlacedImage(0, 5 * number, grid, stored))
        stream += data
    (tmp_path / "a.images").write_bytes(stream)
    return tuple(placed)


@pytest.fixture
def batch(images: tuple[PlacedImage, ...]) -> Batch:
    return replace(pack_chats([[[8, 8]]], SequenceForm(32, 8, 8)), images=images)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_chosen_image_gets_its_pixels(batch: Batch, num_workers: int) -> None:
    decoded = ImageDecoder(encode_image, num_workers, lambda images: [2, 0])(batch)
    for index, (before, after) in enumerate(zip(batch.images, decoded.images, strict=True)):
        assert replace(after, pixels=None) == before
        if index == 1:
            assert after.pixels is None
        else:
            assert after.pixels is not None and after.pixels.equal(encode_image(before.stored.read()))
    assert all(one.equal(other) for one, other in zip(batch.tensors(), decoded.tensors(), strict=True))


def test_a_batch_without_chosen_images_is_left_alone(batch: Batch) -> None:
    assert ImageDecoder(encode_image, 2, lambda images: [])(batch) is batch
    bare = replace(batch, images=())
    assert ImageDecoder(encode_image, 2, choose_all)(bare) is bare


def test_images_are_decoded_at_the_same_time_by_no_more_threads_than_asked(batch: Batch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def encode(data: bytes) -> Tensor:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return encode_image(data)

    many = replace(batch, images=batch.images * 4)
    decoder = ImageDecoder(encode, 3, choose_all)
    others = [threading.Thread(target=decoder, args=(many,)) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert most == 3


def test_threads_end_with_their_decoder(batch: Batch) -> None:
    before = set(threading.enumerate())
    decoder = ImageDecoder(encode_image, 3, choose_all)
    decoder(batch)
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    del decoder
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_a_changed_file_is_named(batch: Batch, tmp_path: Path) -> None:
    content = bytearray((tmp_path / "a.images").read_bytes())
    content[100] ^= 1
    (tmp_path / "a.images").write_bytes(content)
    with pytest.raises(UserError, match=r"the image of \d+ bytes at byte 0 of .*a\.images was changed"):
        ImageDecoder(encode_image, 2, choose_all)(batch)
    (tmp_path / "a.images").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.images: No such file"):
        ImageDecoder(encode_image, 2, choose_all)(batch)


def test_pixels_must_fill_the_grid_of_the_tokens(batch: Batch) -> None:
    wrong = replace(batch, images=(replace(batch.images[0], grid=(1, 2)),))
    with pytest.raises(UserError, match=r"decodes to \(3, 28, 28\), its tokens stand for pixels \(3, 28, 56\)"):
        ImageDecoder(encode_image, 0, choose_all)(wrong)


def test_a_picture_that_this_process_cannot_read_is_named(batch: Batch) -> None:
    def refuse(data: bytes) -> Tensor:
        raise ValueError("no decoder")

    with pytest.raises(UserError, match=r"at byte 0 of .*: no decoder: prepare the data again"):
        ImageDecoder(refuse, 1, choose_all)(batch)


def test_stacked_batches_number_the_sequences_of_their_images(batch: Batch) -> None:
    two = stack_batches([batch, batch])
    stacked = stack_batches([two, replace(batch, images=()), batch])
    assert [image.sequence for image in stacked.images] == [0] * 3 + [1] * 3 + [3] * 3
    assert [image.first for image in stacked.images] == [0, 5, 10] * 3


def test_images_go_with_their_batch_to_another_device(batch: Batch) -> None:
    decoded = ImageDecoder(encode_image, 0, lambda images: [1])(batch).to("meta")
    assert [image.pixels is None for image in decoded.images] == [True, False, True]
    assert decoded.images[1].pixels is not None and decoded.images[1].pixels.device == torch.device("meta")
    assert decoded.tokens.device == torch.device("meta")


def test_a_stored_image_is_pickled_by_name(batch: Batch) -> None:
    stored = batch.images[1].stored
    pickled = pickle.dumps(stored)
    assert len(pickled) < 400 and pickle.loads(pickled).read() == stored.read()


EXIT = """
import sys, time
from pathlib import Path
from threading import Event
import torch
from data_pipeline.batch import Batch, PlacedImage
from data_pipeline.daemons import start_daemon
from data_pipeline.images.decode import ImageDecoder
from data_pipeline.packing.form import SequenceForm
from model.hf.image_processing_nemotron_labs_diffusion_vlm import encode_image
from tests.helpers.packed import pack_chats
from dataclasses import replace

class Stored:
    def read(self):
        return Path(sys.argv[1]).read_bytes()

torch.set_num_threads(1)
images = tuple(PlacedImage(0, 0, (16, 16), Stored()) for _ in range(1000))
batch = replace(pack_chats([[[8, 8]]], SequenceForm(32, 8, 8)), images=images)
begun = Event()

def encode(data):
    begun.set()
    return encode_image(data)

decoder = ImageDecoder(encode, int(sys.argv[2]), lambda images: range(len(images)))
start_daemon("loader", lambda: decoder(batch))
begun.wait()
time.sleep(0.05)
"""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_process_may_end_while_images_are_decoded(num_workers: int, tmp_path: Path) -> None:
    """A daemon that is within torch when the interpreter goes away would abort it."""
    Image.fromarray(np.zeros((440, 440, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    command = [sys.executable, "-W", "ignore", "-c", EXIT, str(tmp_path / "a.png"), str(num_workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "terminate called" not in ended.stderr
