"""Check a picture before it is stored: it is decoded as training will do it.

- One that cannot be decoded to its end, is in no known format or has more than LARGEST_PIXELS pixels is left out.
- What else is unusual is shown by load_image's rules, and counted: turned as its EXIF data say; the first frame of
  several; white where it is transparent; converted to RGB from CMYK, a palette, grey or 16 bits.

Imported by worker processes, so it must import neither torch nor configuration libraries.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, ImageFile

from data_pipeline.images.sources import UnusableImage
from model.hf.image_loading import fit_grid, load_image
from model.hf.image_tokens import Grid

LARGEST_PIXELS = 40_000_000  # A4 at 600 dots per inch has 35 million; decoded, 12 bytes each in fp32
# Formats that are read. Pillow knows others, for some of which it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF


@dataclass(frozen=True)
class CheckedImage:
    """Describes a picture that decodes. grid: its features. fixes: what is done to show it."""

    grid: Grid
    fixes: tuple[str, ...]


def check_image(data: bytes) -> CheckedImage:
    """Decode the file of a picture. Raises UnusableImage if that does not work, or would take too much memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong is counted here
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as opened:
                _refuse_too_large(opened)
                fixes = tuple(_find_fixes(opened))
            return CheckedImage(fit_grid(*load_image(data).size), fixes)
        except UnusableImage:
            raise
        except Image.DecompressionBombError:
            raise UnusableImage("image has too many pixels", f"more than {LARGEST_PIXELS:,}") from None
        except Exception as error:  # whatever a decoder makes of bytes that are no picture
            detail = str(error.__cause__ or error).split("cannot be read: ")[-1]
            raise UnusableImage("image cannot be decoded", detail.partition(" <")[0]) from None


def _refuse_too_large(opened: ImageFile.ImageFile) -> None:
    width, height = opened.size
    if width * height > LARGEST_PIXELS:
        raise UnusableImage("image has too many pixels", f"{width} x {height}, more than {LARGEST_PIXELS:,}")


def _find_fixes(opened: ImageFile.ImageFile) -> Iterator[str]:
    if opened.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        yield "turned as EXIF says"
    if opened.has_transparency_data:
        yield "transparency over white"
    if opened.mode not in ("RGB", "RGBA"):
        yield f"converted from {opened.mode}"
    if getattr(opened, "is_animated", False):  # last: it may look at the next frame
        yield "first frame of several"
