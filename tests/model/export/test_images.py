"""Exports with images load with this repository's classes, and pictures become what the processor makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from conf.system.errors import UserError
from model.export.images import load_image_reader, load_pixels
from model.export.load import check_export, load_config, load_export, load_export_tokenizer
from model.hf.image_tokens import list_image_tokens
from model.hf.modeling_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMModel
from tests.helpers.edit_exports import edit_json
from tests.helpers.tiny_exports import save_tiny_export
from tests.helpers.tiny_vlm import draw_picture, save_vlm_export


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an export with images and two pictures. Do not change them."""
    folder = tmp_path_factory.mktemp("images")
    save_vlm_export(folder / "vlm")
    draw_picture(folder / "a.png", 50, 91)
    draw_picture(folder / "b.png", 400, 300, seed=1)
    return folder


def test_an_export_with_images_is_loaded_as_one(saved: Path) -> None:
    check_export(saved / "vlm")
    model = load_export(saved / "vlm", device="cpu")
    assert isinstance(model, NemotronLabsDiffusionVLMModel) and not model.training
    assert load_config(saved / "vlm").model_type == "nemotron_labs_diffusion_vlm"
    theirs = AutoModel.from_pretrained(saved / "vlm", trust_remote_code=True).state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())


def test_pictures_are_prepared_as_the_processor_does_it(saved: Path) -> None:
    read = load_image_reader(saved / "vlm", load_export_tokenizer(saved / "vlm"))
    assert read is not None
    images = [read(saved / name) for name in ("a.png", "b.png")]
    processor: Any = AutoProcessor.from_pretrained(saved / "vlm", trust_remote_code=True)
    expected = processor(text="<|image_start|><|image_start|>", images=[saved / "a.png", saved / "b.png"])
    pixels = load_pixels(images)
    assert pixels.keys() == {"pixel_values", "image_sizes"}
    assert all(torch.equal(value, expected[name]) for name, value in pixels.items())
    assert expected["input_ids"][0].tolist() == [t for image in images for t in list_image_tokens(image.grid)]


def test_a_model_of_text_opens_no_images(tmp_path: Path) -> None:
    save_tiny_export(tmp_path)
    assert load_image_reader(tmp_path, load_export_tokenizer(tmp_path)) is None


def test_what_does_not_fit_is_one_clear_error(saved: Path, tmp_path: Path) -> None:
    export = Path(shutil.copytree(saved / "vlm", tmp_path / "vlm"))
    tokenizer = load_export_tokenizer(export)
    settings = json.loads((export / "processor_config.json").read_text())["image_processor"]
    edit_json(export / "processor_config.json", image_processor=settings | {"rules": "mine"})
    with pytest.raises(UserError, match=r"processor_config.json cannot be used: there are no rules 'mine'"):
        load_image_reader(export, tokenizer)
    path = export / "tokenizer.json"
    path.write_text(path.read_text().replace("<|image_pad|>", "<SPECIAL_19>"))
    with pytest.raises(UserError, match=r"has no <\|image_pad\|> with id 19, but the model reads images"):
        load_image_reader(export, load_export_tokenizer(export))
    edit_json(export / "config.json", model_type="llava")
    with pytest.raises(UserError, match="has model_type 'llava', not 'nemotron_labs_diffusion' or"):
        check_export(export)
