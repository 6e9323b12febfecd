"""8-bit Ministral 3 checkpoints are read as transformers dequantises them; broken ones are refused."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config

from conf.system.errors import UserError
from model.checkpoint.layout import step_directory
from model.convert.conversion import import_checkpoint
from model.convert.dist_reader import DistReader
from model.convert.fp8 import CHUNK_ELEMENTS, METHOD, dequantize_into, find_scales
from model.convert.hf_source import HfSource
from model.convert.mapping import HEAD, split_views
from model.convert.progress import Progress
from model.convert.safetensors_reader import SafetensorsReader
from tests.helpers.tiny_checkpoints import make_ministral3_vlm, tiny_model_config

LARGEST = 448.0  # of E4M3
MODEL = tiny_model_config(hidden_size=64, ffn_hidden_size=96, head_dim=16)  # whole blocks of 16 x 32
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"


def is_quantized(name):
    """Return whether the releases store a tensor in 8 bits: the text decoder's matrices, not embedding or head."""
    return "language_model.model.layers" in name and name.endswith("proj.weight")


def quantize(weight, block, scale_dtype):
    """Return the 8-bit numbers of a weight and their scales, one number or a grid of blocks."""
    blocks = weight.float()[None, :, None] if block is None else weight.float().unfold(0, block[0], block[0])
    if block is not None:
        blocks = blocks.unfold(1, block[1], block[1])
        scale = (blocks.abs().amax((2, 3)) / LARGEST).to(scale_dtype)
        factors = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    else:
        scale = (blocks.abs().max() / LARGEST).to(scale_dtype)
        factors = scale.float()
    return (weight.float() / factors).to(torch.float8_e4m3fn), scale


def make_fp8(directory, *, block=None, scale_dtype=torch.bfloat16, **options):
    """Write a checkpoint as the instruct releases are: 8-bit matrices with scales, everything else in bf16."""
    make_ministral3_vlm(directory, model=MODEL, **options)
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if is_quantized(name)]:
        weights[name], weights[name + "_scale_inv"] = quantize(weights[name], block, scale_dtype)
        weights[name.replace("weight", "activation_scale")] = torch.tensor(0.02, dtype=scale_dtype)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": METHOD,
        "activation_scheme": "static",
        "weight_block_size": None if block is None else list(block),
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    path.write_text(json.dumps(config))
    return directory


def load_with_transformers(directory) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )


@pytest.mark.parametrize("block", [None, (16, 32)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_that_transformers_dequantizes(tmp_path, block, scale_dtype, tied):
    make_fp8(tmp_path, block=block, scale_dtype=scale_dtype, tied=tied)
    network = load_with_transformers(tmp_path)
    expected = dict(network.model.language_model.named_parameters()) | {HEAD: network.get_output_embeddings().weight}
    with HfSource(tmp_path) as source:
        assert source.dtype == torch.bfloat16
        assert source.num_skipped == 15 + 7 * MODEL.num_layers
        for entry in source.table:
            fused = source.read(entry)
            for suffix, view in zip(entry.hf, split_views(fused, entry, source.config.model), strict=True):
                assert torch.equal(view.reshape(entry.hf[suffix]), expected.pop(suffix)), suffix
    assert not expected


def test_in_fp32_nothing_is_rounded(tmp_path):
    make_fp8(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    with HfSource(tmp_path) as source:
        entry = next(entry for entry in source.table if "linear_proj" in entry.megatron)
        name = "language_model.model." + next(iter(entry.hf))
        exact = stored[name].double() * stored[name + "_scale_inv"].double()
        assert torch.equal(source.read(entry, torch.float32), exact.float())


def test_a_run_folder_begins_with_the_dequantized_weights(tmp_path):
    converted = import_checkpoint(make_fp8(tmp_path / "hf"), tmp_path / "run", "<SPECIAL_100>", Progress())
    assert converted.skipped == 15 + 7 * MODEL.num_layers
    reader = DistReader(step_directory(tmp_path / "run", 0))
    with HfSource(tmp_path / "hf") as source:
        for entry in source.table:
            assert torch.equal(reader.read(entry.megatron), source.read(entry))


@pytest.mark.parametrize("shape", [(3, 5), (130, 4), (64, 96)])
@pytest.mark.parametrize("block", [None, (16, 32), (128, 128)])
def test_chunks_and_blocks_cut_off_at_the_edge(tmp_path, monkeypatch, shape, block):
    monkeypatch.setattr("model.convert.fp8.CHUNK_ELEMENTS", 64)
    assert CHUNK_ELEMENTS > 64
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = () if block is None else tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    scale = torch.rand(grid, generator=generator)
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    factors = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            factors[row, column] = scale if block is None else scale[row // block[0], column // block[1]]
    with SafetensorsReader(tmp_path) as reader:
        scales = find_scales(reader.records, block, tmp_path)
        whole, strided = torch.empty(shape), torch.empty(shape[1], shape[0]).T
        for out in (whole, strided):
            dequantize_into(reader, "w", scales["w"], block, out)
            assert torch.equal(out, weight.float() * factors)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_fp8(tmp_path_factory.mktemp("fp8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY + "_scale_inv"), f"8-bit weights without _scale_inv beside them: {QUERY}"),
        (lambda w: w.update({QUERY: w[QUERY].bfloat16()}), f"scales whose weights are not 8-bit or missing: {QUERY}_s"),
        (lambda w: w.update({QUERY + "_scale_inv": torch.ones(4, 2)}), r"has shape \[4, 2\].* makes it one number"),
        (
            lambda w: w.update({QUERY: w[QUERY].to(torch.float8_e5m2)}),
            "scales whose weights are not 8-bit|format F8_E5M2",
        ),
    ],
)
def test_broken_checkpoints_are_refused(saved, tmp_path, change, message):
    directory = shutil.copytree(saved, tmp_path / "checkpoint")
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message) as error:
        HfSource(directory)
    assert "\n" not in str(error.value)


def test_scales_of_another_grid_are_refused(saved, tmp_path):
    directory = shutil.copytree(saved, tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, 128]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantization_config in config.json makes it \[1, 1\]"):
        HfSource(directory)
