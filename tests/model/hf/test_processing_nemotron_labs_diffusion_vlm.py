"""A saved folder is complete: AutoModel and AutoProcessor read it in another process, without this repository."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from model.export.shipped_code import VLM_TYPE, list_code_files
from model.hf.image_processing_nemotron_labs_diffusion_vlm import (
    NemotronLabsDiffusionVLMImageProcessor,
    encode_image,
)
from model.hf.image_tokens import IMAGE_TOKENS, list_image_tokens
from model.hf.processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMProcessor
from tests.helpers.tiny_checkpoints import VOCAB_SIZE, save_tiny_tokenizer
from tests.helpers.tiny_vlm import LONGEST_EDGE, make_vlm

TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<|image_start|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}"""
START = "<|image_start|>"


def make_tokenizer(folder):
    """Make the tiny tokenizer with the released names of ids 18 to 21."""
    save_tiny_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text()
    for token, token_id in IMAGE_TOKENS.items():
        text = text.replace(f"<SPECIAL_{token_id}>", token)
    (folder / "tokenizer.json").write_text(text)
    return PreTrainedTokenizerFast.from_pretrained(folder, eos_token="</s>")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    images = NemotronLabsDiffusionVLMImageProcessor(longest_edge=LONGEST_EDGE)
    return NemotronLabsDiffusionVLMProcessor(images, tokenizer, chat_template=TEMPLATE)


def make_picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = [make_picture(50, 91), make_picture(28, 28, 1), make_picture(300, 200, 2)]


def test_texts_with_images_become_tokens_and_pixels(processor):
    inputs = processor(text=[f"a{START}b{START}", "c", f"{START}d"], images=PICTURES)
    sizes = inputs["image_sizes"].tolist()
    assert sizes == [[112, 56], [28, 28], [112, 168]]
    for index, (height, width) in enumerate(sizes):
        expected = encode_image(PICTURES[index], LONGEST_EDGE)
        assert torch.equal(inputs["pixel_values"][index, :, :height, :width], expected)
    grids = [list_image_tokens((height // 28, width // 28)) for height, width in sizes]
    a, b, c, d = (processor.tokenizer(letter)["input_ids"] for letter in "abcd")
    prompts = [[*a, *grids[0], *b, *grids[1]], c, [*grids[2], *d]]
    found = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert found == prompts
    assert all(mask.tolist() == sorted(mask.tolist()) for mask in inputs["attention_mask"]), "padding is on the left"


def test_images_may_come_in_a_list_for_each_text(processor):
    texts = [f"a{START}b{START}", "c", f"{START}d"]
    flat = processor(text=texts, images=PICTURES)
    nested = processor(text=texts, images=[PICTURES[:2], [], PICTURES[2:]])
    assert all(torch.equal(flat[name], nested[name]) for name in processor.model_input_names)
    with pytest.raises(ValueError, match=r"the texts have \[2, 0, 1\] times .* the images given are \[1, 0, 2\]"):
        processor(text=texts, images=[PICTURES[:1], [], PICTURES[1:]])


def test_a_text_alone_has_no_pixels(processor):
    inputs = processor(text="hello", return_tensors=None)
    assert set(inputs) == {"input_ids", "attention_mask"} and isinstance(inputs["input_ids"], list)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a", "images": PICTURES[0]}, r"the texts have \[0\] times .* the images given are 1: write it once"),
        ({"text": START}, r"the texts have \[1\] times <\|image_start\|>, the images given are 0"),
        ({"text": "<|image_pad|>"}, "holds 1 tokens of images already"),
        ({"text": "a", "audio": [1]}, "reads text and images"),
        ({"images": PICTURES[0]}, "give text; an image alone is"),
    ],
    ids=["no place", "no image", "expanded", "audio", "no text"],
)
def test_what_does_not_fit_is_one_clear_error(processor, given, message):
    with pytest.raises(ValueError, match=message):
        processor(**given)


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    save_tiny_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"for <\|image_start\|>, not 18: it belongs to a model without images"):
        NemotronLabsDiffusionVLMProcessor(NemotronLabsDiffusionVLMImageProcessor(), tokenizer)


LOAD_AND_DECODE = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
directory, picture, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
options = {"trust_remote_code": True, "output_loading_info": True, "dtype": torch.float32}
model, info = AutoModel.from_pretrained(directory, **options)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert "peft" not in sys.modules and "model.hf" not in sys.modules
low = AutoModel.from_pretrained(directory, trust_remote_code=True, tower_dtype=torch.bfloat16)
assert low.dtype == torch.bfloat16
content = [{"type": "image", "path": picture}, {"type": "text", "text": "what?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
decodes = {mode: model.generate(**inputs, mode=mode, max_new_tokens=12, eos_token_id=[])
           for mode in ("ar", "block_diffusion", "linear", "quadratic")}
alone = AutoImageProcessor.from_pretrained(directory, trust_remote_code=True)(Image.open(picture))
model.save_pretrained(out + ".again")
processor.save_pretrained(out + ".again")
torch.save({"inputs": dict(inputs), "decodes": decodes, "alone": dict(alone), "module": type(model).__module__,
            "bf16": low.generate(**inputs, max_new_tokens=12, eos_token_id=[])[0].shape}, out)
"""


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """Save a bf16 export and let another process load it; return its folder, the model and what that process got."""
    folder = tmp_path_factory.mktemp("saved_vlm")
    model = make_vlm(torch.bfloat16, vocab_size=VOCAB_SIZE, mask_token_id=100)
    model.save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    PICTURES[0].save(folder / "picture.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    paths = [str(folder / name) for name in ("export", "picture.png", "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_DECODE, *paths], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, model, torch.load(folder / "out.pt")


def test_another_process_computes_the_same(saved, processor):
    _, model, results = saved
    assert results["module"].startswith("transformers_modules.")
    expected = processor(text=f"<|im_start|>user\n{START}what?<|im_end|>\n", images=PICTURES[0])
    assert results["inputs"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in results["inputs"].items())
    assert torch.equal(results["alone"]["pixel_values"], expected["pixel_values"])
    for mode, (output, num_forwards) in results["decodes"].items():
        ours, forwards = model.float().generate(**expected, mode=mode, max_new_tokens=12, eos_token_id=[])
        assert torch.equal(output, ours) and num_forwards == forwards, mode
    assert results["bf16"] == output.shape


@pytest.mark.parametrize("directory", ["export", "out.pt.again"])
def test_a_saved_folder_holds_code_config_processor_and_the_released_tensors(saved, directory):
    path = saved[0] / directory
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == VLM_TYPE
    assert config["architectures"] == ["NemotronLabsDiffusionVLMModel"]
    assert {name: value.split("--")[-1] for name, value in config["auto_map"].items()} == {
        "AutoConfig": "configuration_nemotron_labs_diffusion_vlm.NemotronLabsDiffusionVLMConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion_vlm.NemotronLabsDiffusionVLMModel",
    }
    with safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in saved[1].named_parameters()}
    assert {file.name: file.read_text() for file in path.glob("*.py")} == {
        file.name: file.read_text() for file in list_code_files(VLM_TYPE)
    }
