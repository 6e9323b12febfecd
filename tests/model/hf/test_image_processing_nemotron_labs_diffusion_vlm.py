"""Pictures become what mistral-common makes of them, or by choice what transformers' Pixtral processor does."""

import base64
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from model.hf.image_processing_nemotron_labs_diffusion_vlm import (
    NemotronLabsDiffusionVLMImageProcessor,
    encode_image,
    fit_grid,
    load_image,
)
from model.hf.image_tokens import list_image_tokens

SIZES = [(1, 1), (28, 28), (29, 27), (1400, 1400), (1401, 700), (3000, 40), (40, 5000), (1399, 1401)]


def make_picture(width, height, seed=0, mode="RGB"):
    channels = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def random_sizes(number, longest, seed=0):
    draw = random.Random(seed)
    return [(draw.randint(1, longest), draw.randint(1, longest)) for _ in range(number)]


@pytest.fixture(scope="module")
def mistral():
    """Give mistral-common's encoder with our ids."""
    image = pytest.importorskip("mistral_common.tokens.tokenizers.image", reason="mistral-common[image] is missing")
    pytest.importorskip("cv2", reason="mistral-common[image] is missing: no opencv")
    ids = image.SpecialImageIDs(img=19, img_break=20, img_end=21)
    return image.ImageEncoder(image.ImageConfig(image_patch_size=14, max_image_size=1400, spatial_merge_size=2), ids)


def encode_with(mistral, picture):
    chunk = pytest.importorskip("mistral_common.protocol.instruct.chunk")
    return mistral(chunk.ImageChunk(image=picture))


def test_sizes_and_tokens_equal_mistral_common(mistral):
    for width, height in [*SIZES, *random_sizes(3000, 6000)]:
        grid = fit_grid(width, height)
        assert mistral._image_to_num_tokens(Image.new("1", (width, height))) == grid[::-1], (width, height)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pixels_equal_mistral_common(mistral, mode):
    for index, (width, height) in enumerate(random_sizes(20, 500)):
        picture = make_picture(width, height, index, mode)
        theirs = encode_with(mistral, picture)
        ours = encode_image(picture)
        assert list_image_tokens((ours.shape[1] // 28, ours.shape[2] // 28))[1:] == theirs.tokens
        torch.testing.assert_close(ours, torch.from_numpy(np.ascontiguousarray(theirs.image)), atol=2e-4, rtol=0)


@pytest.mark.slow
def test_pixels_of_large_pictures_equal_mistral_common(mistral):
    """Up to rounding: places in a picture of 4000 pixels are good to 1e-4 in fp32, and noise changes at each pixel."""
    grey_level = 1 / 255 / 0.27577711
    for index, (width, height) in enumerate([*SIZES, *random_sizes(20, 4000)]):
        picture = make_picture(width, height, index)
        change = encode_image(picture) - torch.from_numpy(np.ascontiguousarray(encode_with(mistral, picture).image))
        assert change.abs().max() < 0.15 * grey_level and change.abs().mean() < 0.01 * grey_level, (width, height)


def test_sizes_without_mistral_common():
    """The rules restated: half to even, up to multiples of 28, one pixel at least."""
    assert fit_grid(1, 1) == (1, 1)
    assert fit_grid(28, 29) == (2, 1)
    assert fit_grid(1400, 1400) == (50, 50) == fit_grid(9000, 9000)
    assert fit_grid(2800, 57) == (1, 50)  # 28.5 -> 28
    assert fit_grid(2800, 59) == (2, 50)  # 29.5 -> 30
    assert fit_grid(10_000, 1) == (1, 50)
    assert max(max(fit_grid(*size)) for size in random_sizes(500, 9000)) == 50


def test_a_picture_of_the_right_size_is_only_normalised():
    picture = make_picture(56, 28)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double()[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()[:, None, None]
    torch.testing.assert_close(encode_image(picture).double(), (values - mean) / std, atol=1e-6, rtol=0)


def test_the_longest_edge_can_be_smaller():
    processor = NemotronLabsDiffusionVLMImageProcessor(longest_edge=100)
    images = processor([make_picture(300, 200), make_picture(20, 90)])
    assert images["image_sizes"].tolist() == [[84, 112], [112, 28]]
    assert images["pixel_values"].shape == (2, 3, 112, 112)
    assert not images["pixel_values"][0, :, 84:].any() and not images["pixel_values"][1, :, :, 28:].any()
    assert torch.equal(images["pixel_values"][1, :, :112, :28], encode_image(make_picture(20, 90), 100))


def test_the_rules_of_transformers_are_its_own():
    sizes = [(300, 200), (91, 40)]
    theirs = PixtralImageProcessorPil(patch_size={"height": 28, "width": 28}, size={"longest_edge": 140})(
        [make_picture(*size) for size in sizes], return_tensors="pt"
    )
    ours = NemotronLabsDiffusionVLMImageProcessor(longest_edge=140, rules="transformers")(
        [make_picture(*size) for size in sizes]
    )
    assert torch.equal(ours["image_sizes"], torch.as_tensor(theirs["image_sizes"]))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    default = NemotronLabsDiffusionVLMImageProcessor(longest_edge=140)([make_picture(*size) for size in sizes])
    assert (default["pixel_values"] - ours["pixel_values"]).abs().mean() > 0.1, "noise shows what antialiasing does"


def test_the_filter_is_the_cubic_one_without_antialiasing():
    """A bright pixel in the dark shows the weights: those of a = -0.75, which go below zero."""
    values = np.zeros((56, 56, 3), dtype=np.uint8)
    values[20, 20] = 255
    shrunk = encode_image(Image.fromarray(values), 28)
    kernel = interpolate(torch.eye(56)[20].view(1, 1, 56, 1).expand(-1, -1, -1, 4), (28, 2), mode="bicubic")[0, 0, :, 0]
    assert kernel.min() < 0 and shrunk.shape == (3, 28, 28)
    brightness = shrunk[0] * 0.26862954 + 0.48145466
    torch.testing.assert_close(brightness, kernel[:, None] * kernel[None], atol=1e-6, rtol=0)


def to_bytes(picture, form="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_every_way_to_give_a_picture(tmp_path):
    picture = make_picture(5, 4)
    data = to_bytes(picture)
    (tmp_path / "picture.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [picture, np.array(picture), data, tmp_path / "picture.png", str(tmp_path / "picture.png")]
    sources += [f"file://{tmp_path}/picture.png", text, f"data:image/png;base64,{text}"]
    for source in sources:
        assert np.array_equal(np.array(load_image(source)), np.array(picture)), source


def test_transparency_is_white_and_a_turned_photograph_stands_up():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.array_equal(np.array(load_image(clear)), np.full((2, 2, 3), 255))
    turned = Image.new("RGB", (6, 2), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_image(to_bytes(turned, "JPEG", exif=exif)).size == (2, 6)
    assert load_image(Image.new("L", (3, 3), 7)).mode == load_image(Image.new("CMYK", (3, 3))).mode == "RGB"
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    animated = load_image(to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert animated.getpixel((0, 0)) == (255, 0, 0)


def test_16_bits_become_8():
    values = np.arange(0, 37 * 23 * 77, 37, dtype=np.uint16).reshape(23, 77)
    for form in ("PNG", "TIFF"):
        loaded = np.array(load_image(to_bytes(Image.fromarray(values), form)))
        assert np.array_equal(loaded, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("source", [b"no picture", "nowhere.png", "data:image/png;base64,AAAA", "data:,!", 5], ids=str)
def test_what_is_no_picture_is_one_clear_error(source):
    with pytest.raises(ValueError, match=r"the image .* cannot be read|an image is a PIL image"):
        load_image(source)


def test_a_broken_picture_is_one_clear_error():
    with pytest.raises(ValueError, match=r"the image b'.*\.\.\. cannot be read"):
        load_image(to_bytes(make_picture(40, 40))[:-900])


def test_no_picture_unknown_rules_and_tiny_edges_are_refused():
    with pytest.raises(ValueError, match="no image was given"):
        NemotronLabsDiffusionVLMImageProcessor()([])
    with pytest.raises(ValueError, match="there are no rules 'pixtral' for images: choose mistral or transformers"):
        NemotronLabsDiffusionVLMImageProcessor(rules="pixtral")
    with pytest.raises(ValueError, match="longest_edge is 20; it must be at least 28 pixels"):
        NemotronLabsDiffusionVLMImageProcessor(longest_edge=20)


def test_its_settings_are_saved(tmp_path):
    NemotronLabsDiffusionVLMImageProcessor(longest_edge=700).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded.longest_edge, loaded.rules) == (700, "mistral")
    assert torch.equal(loaded(make_picture(90, 90))["pixel_values"][0], encode_image(make_picture(90, 90)))
