"""Whole conversions: exact values, the released format, byte-identical round trips, nothing half-written."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from conf.system.errors import UserError
from model.checkpoint import layout
from model.checkpoint.checksums import read_sums
from model.convert import conversion
from model.convert.checkpoint_info import read_checkpoint_info
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.dist_reader import DistReader
from model.convert.dist_writer import DistWriter
from model.convert.mapping import build_tensor_table
from model.convert.progress import Progress
from model.convert.safetensors_writer import SafetensorsWriter
from model.export.load import load_export
from model.export.shipped_code import list_code_files
from model.hf.options import resolve_stop_ids
from tests.helpers.edit_exports import edit_json
from tests.helpers.tiny_checkpoints import MASK_TOKEN, ORIGINAL_MAX_POSITIONS, make_ministral3_vlm, tiny_model_config

SHARD_BYTES = 50_000
# What vLLM and SGLang read of config.json.
READ_BY_OTHERS = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "attention_bias", "mlp_bias", "sliding_window", "mask_token_id", "block_size"),
    *("rope_parameters", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
}
ROPE_READ_BY_OTHERS = {
    *("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "llama_4_scaling_beta"),
}


def do_import(source, target, **options):
    return import_checkpoint(source, target, MASK_TOKEN, Progress(), **options)


def do_export(source, target, max_shard_bytes=10**9, **options):
    return export_checkpoint(source, target, Progress(), max_shard_bytes=max_shard_bytes, **options)


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save `hf` (fp32, tied, vision wrapper), `run` imported from it, `nld` exported from that. Do not change them."""
    folder = tmp_path_factory.mktemp("conversion")
    make_ministral3_vlm(folder / "hf", dtype=torch.float32, factor=0.25)
    do_import(folder / "hf", folder / "run")
    do_export(folder / "run", folder / "nld")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Make a private copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_an_export_holds_exactly_the_weights_rounded_to_bf16(saved):
    theirs, ours = load_file(saved / "hf" / "model.safetensors"), load_file(saved / "nld" / "model.safetensors")
    assert len(ours) == 9 * 4 + 3
    head = ours.pop("diffusion_head.weight")
    assert torch.equal(head, ours["encoder.embed_tokens.weight"])
    for name, weight in ours.items():
        expected = theirs["language_model.model." + name.removeprefix("encoder.")]
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected.bfloat16()), name


def test_an_export_declares_the_released_format(saved):
    values = json.loads((saved / "nld" / "config.json").read_text())
    assert values["architectures"] == ["NemotronLabsDiffusionModel"]
    assert values["model_type"] == "nemotron_labs_diffusion"
    assert values["auto_map"] == {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    }
    assert values["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 0.25,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    expected = {
        "tie_word_embeddings": False,
        "mask_token_id": 100,
        "block_size": 32,
        "dlm_paradigm": "bidirectional",
        "dlm_loss_weight": 0.3,
        "ar_loss_weight": 1.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert {key: values.get(key) for key in expected} == expected


def test_an_export_has_every_key_that_other_programs_read(saved):
    """Explicitly, null included: for a key that is missing, vLLM takes the 3B's value."""
    values, generation = (
        json.loads((saved / "nld" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert values.keys() >= READ_BY_OTHERS
    assert values["rope_parameters"].keys() >= ROPE_READ_BY_OTHERS
    assert {key for key in READ_BY_OTHERS if values[key] is None} == {"sliding_window", "pad_token_id"}
    assert generation == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_denoising_steps": values["block_size"],
        "diffusion_selection_policy": "confidence_threshold",
        "diffusion_confidence_threshold": 0.9,
    }


def test_an_export_brings_its_code_tokenizer_and_generation_config(saved):
    names = {path.name for path in (saved / "nld").iterdir()}
    assert {path.name for path in list_code_files()} <= names
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    config = AutoConfig.from_pretrained(saved / "nld", trust_remote_code=True)
    assert config.rope_parameters["factor"] == 0.25 and config.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(saved / "nld").convert_tokens_to_ids(MASK_TOKEN) == 100


def test_an_export_lists_the_sha256_of_each_of_its_files(saved):
    sums = read_sums(saved / "nld")
    assert sums is not None
    assert sums.keys() == {path.name for path in (saved / "nld").iterdir()} - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=saved / "nld", check=True)


@pytest.mark.parametrize(("tied", "factor"), [(True, 16.0), (False, 0.25)])
def test_an_export_computes_what_transformers_computes_for_the_source(tmp_path, tied, factor):
    source = make_ministral3_vlm(tmp_path / "hf", tied=tied, factor=factor)  # bf16: nothing is rounded on the way
    do_import(tmp_path / "hf", tmp_path / "run")
    do_export(tmp_path / "run", tmp_path / "nld")
    exported, report = AutoModel.from_pretrained(
        tmp_path / "nld", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(101, 384, (2, 3 * ORIGINAL_MAX_POSITIONS))
    with torch.no_grad():
        expected = source.float()(input_ids=tokens).logits
        torch.testing.assert_close(exported(input_ids=tokens).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard_bytes", [10**9, SHARD_BYTES])
def test_export_import_export_is_byte_identical(saved, tmp_path, shard_bytes):
    do_export(saved / "run", tmp_path / "first", max_shard_bytes=shard_bytes)
    do_import(tmp_path / "first", tmp_path / "run")
    do_export(tmp_path / "run", tmp_path / "second", max_shard_bytes=shard_bytes)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "second")
    assert (Path("model.safetensors.index.json") in first) == (shard_bytes == SHARD_BYTES)


def test_values_only_the_hugging_face_config_has_survive(folder):
    edit_json(folder / "nld" / "config.json", dlm_loss_weight=0.7, seq_length=77, eos_token_id=11, block_size=16)
    edit_json(folder / "nld" / "generation_config.json", eos_token_id=11)
    do_import(folder / "nld", folder / "again")
    do_export(folder / "again", folder / "nld2")
    before, after = (json.loads((folder / name / "config.json").read_text()) for name in ("nld", "nld2"))
    assert before == after
    info = read_checkpoint_info(folder / "again")
    assert (info.eos_token_id, info.block_size, info.export["seq_length"]) == (11, 16, 77)
    assert read_checkpoint_info(folder / "nld").export == info.export


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, [2, 11], [2, 11]),
        (2, [11], [11]),
        ([2, 11], None, [2, 11]),
        (None, [11, 2], [11, 2]),
        (11, None, [11]),
        (None, None, [2]),  # the tokenizer's
    ],
)
def test_stops_and_sampling_defaults_are_those_of_decoding_and_reach_the_export(
    folder, tmp_path, config, generation, expected
):
    """Wherever the source names them: generation_config.json goes before config.json, as when it decodes."""
    source = folder / "nld"
    edit_json(source / "config.json", eos_token_id=config)
    edit_json(
        source / "generation_config.json", eos_token_id=generation, temperature=0.6, diffusion_confidence_threshold=0.8
    )
    info = read_checkpoint_info(source)
    assert info.eos_token_id == expected[0]
    do_import(source, tmp_path / "run")
    do_export(tmp_path / "run", tmp_path / "export")
    for name in ("config.json", "generation_config.json"):
        eos = json.loads((tmp_path / "export" / name).read_text())["eos_token_id"]
        assert (eos if isinstance(eos, list) else [eos]) == expected
    assert resolve_stop_ids(load_export(tmp_path / "export", device="cpu"), None) == tuple(expected)
    values = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert (values["temperature"], values["diffusion_confidence_threshold"]) == (0.6, 0.8)
    assert "decoding_defaults" not in json.loads((tmp_path / "export" / "config.json").read_text())
    assert "temperature" not in json.loads((tmp_path / "export" / "config.json").read_text())


@pytest.mark.parametrize("value", [[2, "11"], 384, -1, True, {"id": 2}])
def test_stops_that_are_no_ids_are_refused(folder, tmp_path, value):
    edit_json(folder / "nld" / "generation_config.json", eos_token_id=value)
    with pytest.raises(
        UserError, match=r"generation_config.json has eos_token_id .*: it must be one or several token ids"
    ):
        do_import(folder / "nld", tmp_path / "run")


def test_the_manifest_says_where_the_weights_come_from(saved):
    manifest = layout.load_checkpoint_manifest(layout.resolve_checkpoint(saved / "run"))
    model = layout.model_config_from(manifest.model, "run")
    assert model == replace(tiny_model_config(factor=0.25), name="hf")
    assert (manifest.step, manifest.stage, manifest.dtype, manifest.eos_token_id) == (0, "import", "float32", 2)
    assert manifest.tokenizer["mask_token_id"] == 100 and manifest.export == {"bos_token_id": 1}


def test_the_dtype_is_the_sources_unless_asked_for(saved, tmp_path):
    do_import(saved / "hf", tmp_path / "run", dtype=torch.bfloat16)
    step = layout.resolve_checkpoint(tmp_path / "run")
    DistReader(step).check(build_tensor_table(tiny_model_config()), torch.bfloat16)
    DistReader(layout.resolve_checkpoint(saved / "run")).check(build_tensor_table(tiny_model_config()), torch.float32)
    do_export(saved / "run", tmp_path / "fp32", dtype=torch.float32)
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["torch_dtype"] == "float32"
    theirs, ours = load_file(saved / "hf" / "model.safetensors"), load_file(tmp_path / "fp32" / "model.safetensors")
    name = "layers.3.self_attn.k_proj.weight"
    assert torch.equal(ours["encoder." + name], theirs["language_model.model." + name])


def test_a_step_directory_exports_like_its_run(saved, tmp_path):
    do_export(layout.resolve_checkpoint(saved / "run"), tmp_path / "nld")
    assert contents(tmp_path / "nld") == contents(saved / "nld")


class Stop(Exception):
    """Stands for a kill, a full disk, a lost network mount."""


@pytest.mark.parametrize(
    ("direction", "owner"), [(do_import, DistWriter), (do_export, SafetensorsWriter)], ids=["import", "export"]
)
def test_a_conversion_stopped_midway_leaves_nothing(saved, tmp_path, monkeypatch, direction, owner):
    original, calls = owner.add, []

    def add(self, *arguments):
        calls.append(arguments)
        if len(calls) == 6:
            (left,) = tmp_path.iterdir()
            assert left.name.startswith(".out.") and left.name.endswith(".partial")
            raise Stop
        return original(self, *arguments)

    monkeypatch.setattr(owner, "add", add)
    with pytest.raises(Stop):
        direction(saved / ("hf" if direction is do_import else "run"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("direction", [do_import, do_export], ids=["import", "export"])
def test_what_reads_back_differently_is_removed(saved, tmp_path, monkeypatch, direction):
    original, calls = conversion.compute_checksum, []

    def one_wrong_bit(tensor):
        calls.append(tensor)
        return original(tensor) ^ (len(calls) == 5)

    monkeypatch.setattr(conversion, "compute_checksum", one_wrong_bit)
    with pytest.raises(UserError, match=r"reads back differently.*it was removed"):
        direction(saved / ("hf" if direction is do_import else "run"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def refuse_import(folder, message, mask_token=MASK_TOKEN):
    with pytest.raises(UserError, match=message):
        import_checkpoint(folder / "hf", folder / "new", mask_token, Progress())
    assert not list(folder.glob("new*"))


def test_a_tokenizer_without_the_mask_token_is_refused(saved, folder):
    refuse_import(folder, "no mask token '<MASK>'.*--mask-token", mask_token="<MASK>")


def test_a_checkpoint_without_tokenizer_is_refused(folder):
    (folder / "hf" / "tokenizer.json").unlink()
    refuse_import(folder, r"has no tokenizer\.json")


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    content = json.loads((folder / "hf" / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 384, "content": "<late>"})
    (folder / "hf" / "tokenizer.json").write_text(json.dumps(content))
    refuse_import(folder, "ids up to 384, but the embedding only 384 rows")


def test_a_truncated_source_is_refused_before_anything_is_written(folder):
    path = folder / "hf" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    refuse_import(folder, "cut off")


def test_a_declared_mask_id_must_be_the_tokenizers(folder):
    edit_json(folder / "nld" / "config.json", mask_token_id=99)
    with pytest.raises(UserError, match="mask_token_id 99, but '<SPECIAL_100>' is token 100"):
        do_import(folder / "nld", folder / "new")


def refuse_export(folder, message):
    with pytest.raises(UserError, match=message):
        do_export(folder / "run", folder / "new")
    assert not list(folder.glob("new*"))


def test_an_export_without_its_tokenizer_is_refused(folder):
    shutil.rmtree(folder / "run" / "tokenizer")
    refuse_export(folder, r"tokenizer has no tokenizer\.json")


def test_an_export_with_another_tokenizer_is_refused(folder):
    path = folder / "run" / "tokenizer" / "tokenizer.json"
    edit_json(path, normalizer={"type": "Lowercase"})
    refuse_export(folder, "other fingerprint")


def test_a_damaged_megatron_checkpoint_is_refused(folder):
    step = layout.resolve_checkpoint(folder / "run")
    for name, message in (("__0_0.distcp", "lacks the file __0_0"), (".metadata", r"has no \.metadata")):
        (step / name).unlink()
        refuse_export(folder, message)


def test_a_cut_off_megatron_file_is_refused(folder):
    path = layout.resolve_checkpoint(folder / "run") / "__0_0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    refuse_export(folder, r"is cut off: \d+ of \d+ bytes")


def test_a_megatron_file_with_damaged_bytes_is_refused(folder):
    path = layout.resolve_checkpoint(folder / "run") / "__0_0.distcp"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)
    refuse_export(folder, "is damaged: __0_0.distcp has another checksum")


def test_weights_that_do_not_fit_the_manifest_are_refused(folder):
    step = layout.resolve_checkpoint(folder / "run")
    manifest = layout.load_checkpoint_manifest(step)
    for change, message in (
        ({"num_layers": 5}, r"missing decoder\.layers\.4"),
        ({"num_layers": 3}, r"unknown decoder\.layers\.3"),
        ({"vocab_size": 400}, r"embedding\.word_embeddings\.weight has shape \[384, 48\].*makes it \[400, 48\]"),
    ):
        layout.save_checkpoint_manifest(step, replace(manifest, model=manifest.model | change))
        refuse_export(folder, message)
