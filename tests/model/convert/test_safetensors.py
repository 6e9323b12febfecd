"""Our reader and writer agree with the safetensors library, and refuse what is not whole."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Ministral3ForCausalLM

from conf.system.errors import UserError
from model.convert.safetensors_reader import INDEX_NAME, SafetensorsReader
from model.convert.safetensors_writer import SafetensorsWriter, TensorSpec, plan_shards
from tests.helpers.tiny_checkpoints import make_ministral3_vlm

WEIGHTS = {
    "b": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(7),
    "half": torch.randn(2, 2).half(),
    "scalar": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
}


def write(directory, weights, max_shard_bytes=10**9):
    directory.mkdir(exist_ok=True)
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in weights.items()]
    with SafetensorsWriter(directory, specs, max_shard_bytes) as writer:
        for name, value in weights.items():
            writer.add(name, value)
    return directory


def assert_reads(directory, weights):
    with SafetensorsReader(directory) as reader:
        assert reader.records.keys() == weights.keys()
        for name, value in weights.items():
            read = reader.read(name)
            assert read.dtype == value.dtype and torch.equal(read, value), name


def test_we_read_what_the_library_writes(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_reads(tmp_path, WEIGHTS)


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path, WEIGHTS)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in WEIGHTS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_bounded_named_and_indexed(tmp_path):
    weights = {f"w{i}": torch.full((25,), float(i)) for i in range(7)}
    write(tmp_path, weights, max_shard_bytes=200)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_parameters": 175, "total_size": 700}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name])
    assert_reads(tmp_path, weights)


def test_a_tensor_larger_than_a_shard_gets_its_own():
    specs = [TensorSpec(name, (size,), torch.float32) for name, size in (("a", 1), ("big", 100), ("b", 1))]
    assert [[spec.name for spec in shard] for shard in plan_shards(specs, 40)] == [["a"], ["big"], ["b"]]


def test_read_into_fills_views_and_casts(tmp_path):
    weight = torch.randn(6, 4)
    write(tmp_path, {"w": weight})
    out = torch.zeros(2, 6, 2, dtype=torch.bfloat16)
    with SafetensorsReader(tmp_path) as reader:
        reader.read_into("w", out[:, ::1].view(2, 3, 2, 2).transpose(1, 2))
        strided = torch.zeros(6, 8)
        reader.read_into("w", strided[:, ::2])
    assert torch.equal(strided[:, ::2], weight)
    assert torch.equal(out.view(2, 3, 2, 2).transpose(1, 2).reshape(6, 4), weight.bfloat16())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    first, second = (write(tmp_path / name, WEIGHTS) / "model.safetensors" for name in ("x", "y"))
    assert first.read_bytes() == second.read_bytes()


def refuse(directory, message):
    with pytest.raises(UserError, match=message):
        SafetensorsReader(directory)


@pytest.mark.parametrize("removed", [1, 60])
def test_a_truncated_file_is_refused(tmp_path, removed):
    path = write(tmp_path, WEIGHTS) / "model.safetensors"
    os.truncate(path, path.stat().st_size - removed)
    refuse(tmp_path, r"model\.safetensors is cut off: \d+ of \d+ bytes")


@pytest.mark.parametrize("size", [0, 4, 8, 20])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path, size):
    path = write(tmp_path, WEIGHTS) / "model.safetensors"
    os.truncate(path, size)
    refuse(tmp_path, "cut off inside its header")


def test_bytes_after_the_data_are_refused(tmp_path):
    path = write(tmp_path, WEIGHTS) / "model.safetensors"
    os.truncate(path, path.stat().st_size + 3)
    refuse(tmp_path, "3 bytes too long")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a":{"dtype":"F32"}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0.0,8.0]}}',
        b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"X","shape":[2],"data_offsets":[0,12]},"b":{"dtype":"X","shape":[2],"data_offsets":[12,8]}}',
        b"[" * 200_000,
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    refuse(tmp_path, "damaged header|too long")


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, {f"w{i}": torch.zeros(25) for i in range(4)}, max_shard_bytes=100)
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    refuse(tmp_path, r"lacks model-00003-of-00004\.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.update(extra="model-00001-of-00002.safetensors"), "does not hold: extra"),
        (lambda names: names.update(w0="model-00002-of-00002.safetensors"), "does not hold: w0"),
        (lambda names: names.pop("w1"), "does not name: w1"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, change, message):
    write(tmp_path, {f"w{i}": torch.zeros(25) for i in range(4)}, max_shard_bytes=200)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    change(index["weight_map"])
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    refuse(tmp_path, message)


def test_a_single_file_counts_before_the_index_of_earlier_shards_as_for_transformers(tmp_path):
    network = make_ministral3_vlm(tmp_path, spelling="text", seed=1, shards=True)
    assert (tmp_path / INDEX_NAME).is_file()
    newer = make_ministral3_vlm(tmp_path / "newer", spelling="text", seed=2)
    (tmp_path / "newer" / "model.safetensors").rename(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    loaded = Ministral3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).get_parameter(name)
    with SafetensorsReader(tmp_path) as reader:
        assert torch.equal(reader.read(name), loaded)
    assert torch.equal(loaded, newer.get_parameter(name))
    assert not torch.equal(loaded, network.get_parameter(name))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 200_000])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    refuse(tmp_path, r"index\.json is damaged")


def test_a_directory_without_safetensors_is_refused_with_the_reason(tmp_path):
    refuse(tmp_path / "typo", "not a directory")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuse(tmp_path, r"pickled \.bin weights")
