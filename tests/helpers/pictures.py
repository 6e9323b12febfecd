"""Pictures of every kind, and a workshop that prepares chats with them."""

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import SourceReport, report_source


def to_file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def make_picture(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    """Return the PNG file of a picture of noise."""
    return to_file(draw_noise(width, height, seed))


def draw_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turned() -> bytes:
    image = draw_noise(90, 20)
    exif = image.getexif()
    exif[0x0112] = 6
    return to_file(image, "JPEG", exif=exif)


GREY_16 = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
FRAMES = [draw_noise(40, 30, seed) for seed in range(3)]
# Pictures that are shown: grid of features, what is done to show them.
USABLE: dict[str, tuple[bytes, tuple[int, int], set[str]]] = {
    "plain": (to_file(draw_noise(40, 30)), (2, 2), set()),
    "one pixel": (to_file(Image.new("RGB", (1, 1))), (1, 1), set()),
    "very long": (to_file(Image.new("RGB", (3000, 1))), (1, 50), set()),
    "large": (to_file(Image.new("L", (4000, 2000)), "JPEG"), (25, 50), {"converted from L"}),
    "turned": (turned(), (4, 1), {"turned as EXIF says"}),
    "CMYK": (to_file(draw_noise(40, 30).convert("CMYK"), "JPEG"), (2, 2), {"converted from CMYK"}),
    "palette": (to_file(draw_noise(40, 30).convert("P")), (2, 2), {"converted from P"}),
    "16 bits": (to_file(GREY_16), (2, 2), {"converted from I;16"}),
    "transparent": (to_file(draw_noise(40, 30).convert("RGBA")), (2, 2), {"transparency over white"}),
    "transparent grey": (
        to_file(draw_noise(40, 30).convert("LA")), (2, 2), {"transparency over white", "converted from LA"}
    ),
    "animated GIF": (
        to_file(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
        (2, 2),
        {"converted from P", "first frame of several"},
    ),
    "animated WebP": (
        to_file(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), (2, 2), {"first frame of several"}
    ),
}  # fmt: skip
UNUSABLE: dict[str, tuple[bytes, str]] = {
    "no picture": (b"no picture " * 9, "image cannot be decoded"),
    "PNG that was cut off": (to_file(draw_noise(40, 30))[:-900], "image cannot be decoded"),
    "JPEG that was cut off": (to_file(draw_noise(40, 30), "JPEG")[:-200], "image cannot be decoded"),
    "GIF that was cut off": (to_file(draw_noise(40, 30), "GIF")[:-500], "image cannot be decoded"),
    "PostScript": (to_file(draw_noise(40, 30), "EPS"), "image cannot be decoded"),
    "large as a bomb": (to_file(Image.new("1", (20000, 20000))), "image has too many pixels"),
    "larger than is read": (to_file(Image.new("1", (8000, 8000))), "image has too many pixels"),
    "empty": (b"", "image is empty"),
}


@dataclass
class ImageWorkshop:
    """prepare(...) makes `folder`/out from `folder`/in or what `files` says."""

    folder: Path
    tokenizer_dir: Path

    @property
    def input(self) -> Path:
        (self.folder / "in").mkdir(exist_ok=True)
        return self.folder / "in"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def write_lines(self, records: list[dict[str, Any]], name: str = "a.jsonl") -> Path:
        path = self.input / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def data(self, **settings: Any) -> DataConfig:
        defaults = {"workers": 1, "shard_bytes": 1e6, "chat_template": "chatml"}
        return DataConfig(tokenizer=str(self.tokenizer_dir), prepare=PrepareConfig(**(defaults | settings)))

    def source(self, output: Path | None = None, **input_: Any) -> SourceConfig:
        where: dict[str, Any] = {} if "dataset" in input_ else {"files": str(self.input)}
        config = InputConfig(kind=DocumentKind.image_chat, **(where | input_))
        return SourceConfig(path=str(output or self.output), input=config)

    def prepare(
        self, output: Path | None = None, input_: dict[str, Any] | None = None, **settings: Any
    ) -> SourceReport:
        return report_source("pictures", self.source(output, **(input_ or {})), self.data(**settings))


def ask(*content: Any, response: str = "It is green.") -> list[dict[str, Any]]:
    """Return messages: a question of these parts, and its response."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": response}]
