"""Decode the images of batches, in threads: Pillow and torch release the interpreter's lock while they work."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from torch import Tensor

from conf.system.errors import UserError
from data_pipeline.batch import Batch, PlacedImage
from data_pipeline.daemons import is_ending, start_daemon
from model.hf.image_loading import PIXELS_PER_FEATURE

# The future of an image to decode; None ends a thread.
type _Tasks = SimpleQueue[tuple[Future[Tensor], PlacedImage] | None]


@dataclass
class ImageDecoder:
    """Gives images of a batch their pixels; BatchLoader calls it where it builds batches.

    encode: turns the file of a picture into pixels [3, H, W]; raises ValueError if it cannot.
    num_workers: threads, shared by all batches of this process; 0 decodes in the calling thread.
    chooses: returns the indices of those images of a batch which this process is to decode.
    """

    encode: Callable[[bytes], Tensor]
    num_workers: int
    chooses: Callable[[Sequence[PlacedImage]], Iterable[int]]
    _tasks: "_Tasks" = field(default_factory=SimpleQueue, init=False, repr=False)

    def __post_init__(self) -> None:
        for number in range(self.num_workers):
            start_daemon(f"image-decoder-{number}", _work, self._tasks, self.encode)
        weakref.finalize(self, _end, self._tasks, self.num_workers)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the pixels of the chosen images.

        Raises UserError for a file that is not what was stored, or that does not give pixels of its image's grid.
        """
        chosen = {index: self._submit(batch.images[index]) for index in self.chooses(batch.images)}
        if not chosen:
            return batch
        images = list(batch.images)
        for index, pixels in chosen.items():
            images[index] = replace(images[index], pixels=pixels.result())
        return replace(batch, images=tuple(images))

    def _submit(self, image: PlacedImage) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        if self.num_workers and not is_ending.is_set():
            self._tasks.put((future, image))
        else:
            _fulfil(future, image, self.encode)
        return future


def _work(tasks: "_Tasks", encode: Callable[[bytes], Tensor]) -> None:
    while (task := tasks.get()) is not None:
        _fulfil(*task, encode)
        del task  # pixels must not stay until the next image comes


def _end(tasks: "_Tasks", num_workers: int) -> None:
    for _ in range(num_workers):
        tasks.put(None)


def _fulfil(future: Future[Tensor], image: PlacedImage, encode: Callable[[bytes], Tensor]) -> None:
    try:
        if is_ending.is_set():
            raise RuntimeError("the process is ending")
        future.set_result(_decode(image, encode))
    except BaseException as error:  # raised where the pixels are asked for
        future.set_exception(error)


def _decode(image: PlacedImage, encode: Callable[[bytes], Tensor]) -> Tensor:
    data = image.stored.read()
    try:
        pixels = encode(data)
    except ValueError as error:
        raise UserError(f"{image.stored}: {error}: prepare the data again with the libraries of this run") from error
    height, width = (PIXELS_PER_FEATURE * features for features in image.grid)
    if pixels.shape != (3, height, width):
        raise UserError(
            f"{image.stored} decodes to {tuple(pixels.shape)}, its tokens stand for pixels {(3, height, width)}: "
            "prepare the data again with the libraries and the image rules of this run"
        )
    return pixels
