"""Sequences are the chunks of the stored stream, each once per epoch; unusable data are refused in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from data_pipeline.dataset import TokenDataset
from data_pipeline.manifest import bin_path, index_path, load_manifest, manifest_path

LENGTH, BLOCK = 32, 8


def open_dataset(prefix: Path, seed: int = 1, shuffle: bool = True, length: int = LENGTH) -> TokenDataset:
    return TokenDataset(prefix, length, BLOCK, seed, shuffle)


def chunks(prefix: Path) -> np.ndarray:
    """[num_samples, LENGTH] chunks of the file, read without our code."""
    stream = np.fromfile(bin_path(prefix), dtype=np.uint16).astype(np.int64)
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


def test_in_order_the_samples_are_the_stream(prefix: Path) -> None:
    dataset = open_dataset(prefix, shuffle=False)
    wanted = chunks(prefix)
    assert dataset.num_samples == len(wanted)
    assert np.array_equal(dataset.build_batch(range(len(wanted))).tokens, wanted)
    assert np.array_equal(dataset.build_batch([len(wanted) + 3]).tokens[0], wanted[3]), "the next epoch starts over"


def test_an_epoch_holds_every_chunk_once(prefix: Path) -> None:
    dataset = open_dataset(prefix)
    for epoch in (0, 1):
        indices = range(epoch * dataset.num_samples, (epoch + 1) * dataset.num_samples)
        rows = dataset.build_batch(indices).tokens.tolist()
        assert sorted(rows) == sorted(chunks(prefix).tolist())


def test_epochs_and_seeds_have_their_own_order(prefix: Path) -> None:
    first, other = open_dataset(prefix, seed=1), open_dataset(prefix, seed=2)
    n = first.num_samples
    orders = [[d.chunk_index(i + e * n) for i in range(n)] for d in (first, other) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == [open_dataset(prefix, seed=1).chunk_index(i) for i in range(n)]


def test_a_batch_says_what_every_token_belongs_to(prefix: Path) -> None:
    batch = open_dataset(prefix).build_batch([5, 70000])
    assert batch.sample_indices.tolist() == [5, 70000]
    assert batch.positions.tolist() == [list(range(LENGTH))] * 2
    assert batch.block_ids.tolist() == [[s // BLOCK for s in range(LENGTH)]] * 2
    assert not batch.document_ids.any()
    assert batch.loss_mask.all()
    assert batch.loss_mask.dtype == torch.bool
    names = ("tokens", "document_ids", "block_ids", "positions", "sample_indices")
    assert {getattr(batch, name).dtype for name in names} == {torch.int64}
    assert batch.to("meta").tokens.device.type == "meta"


def test_token_counts_are_those_of_the_file(prefix: Path) -> None:
    stream = np.fromfile(bin_path(prefix), dtype=np.uint16)
    assert np.array_equal(open_dataset(prefix).count_tokens(370), np.bincount(stream, minlength=370))


def test_fingerprint_is_the_manifests_or_the_indexs(own_prefix: Path) -> None:
    manifest = load_manifest(own_prefix)
    with_manifest = open_dataset(own_prefix).fingerprint()
    manifest_path(own_prefix).unlink()
    without = open_dataset(own_prefix).fingerprint()
    assert manifest is not None
    assert with_manifest["sha256"] == manifest.sha256
    assert with_manifest["tokenizer_fingerprint"] == manifest.tokenizer_fingerprint
    assert without["sha256"] != manifest.sha256
    assert (without["tokens"], without["documents"]) == (manifest.tokens, manifest.documents)


@pytest.mark.parametrize("path", [bin_path, index_path])
def test_a_missing_file_is_named(own_prefix: Path, path) -> None:
    path(own_prefix).unlink()
    with pytest.raises(UserError, match=path(own_prefix).name):
        open_dataset(own_prefix)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * len(data)])
def test_a_broken_index_is_named(own_prefix: Path, damage) -> None:
    index_path(own_prefix).write_bytes(damage(index_path(own_prefix).read_bytes()))
    with pytest.raises(UserError, match=r"own\.idx is not a complete"):
        open_dataset(own_prefix)


def test_a_truncated_token_file_is_refused(own_prefix: Path) -> None:
    bin_path(own_prefix).write_bytes(bin_path(own_prefix).read_bytes()[:-2])
    with pytest.raises(UserError, match="do not belong together"):
        open_dataset(own_prefix)


def test_an_empty_token_file_is_refused(own_prefix: Path) -> None:
    bin_path(own_prefix).write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        open_dataset(own_prefix)


def test_less_than_one_sequence_is_refused(prefix: Path) -> None:
    with pytest.raises(UserError, match="fewer than one sequence"):
        open_dataset(prefix, length=8_000_000)


def test_a_sequence_that_is_no_multiple_of_a_block_is_refused(prefix: Path) -> None:
    with pytest.raises(UserError, match="block_size"):
        open_dataset(prefix, length=33)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_ids_beyond_the_models_vocabulary_are_refused(own_prefix: Path, with_manifest: bool) -> None:
    largest = int(chunks(own_prefix).max())
    if not with_manifest:
        manifest_path(own_prefix).unlink()
    dataset = open_dataset(own_prefix)
    dataset.check_vocabulary(largest + 1)
    with pytest.raises(UserError, match=f"token id {largest}"):
        dataset.check_vocabulary(largest)


def test_another_tokenizer_is_refused(prefix: Path) -> None:
    dataset = open_dataset(prefix)
    dataset.check_tokenizer(str(dataset.fingerprint()["tokenizer_fingerprint"]))
    with pytest.raises(UserError, match="tokenise the data again"):
        dataset.check_tokenizer("another")


@pytest.mark.parametrize("text", ["{", "{}", "[]", json.dumps({"tokens": 3})])
def test_a_broken_manifest_is_named(own_prefix: Path, text: str) -> None:
    manifest_path(own_prefix).write_text(text)
    with pytest.raises(UserError, match="manifest"):
        open_dataset(own_prefix)


def test_a_manifest_of_other_data_is_refused(own_prefix: Path) -> None:
    values = json.loads(manifest_path(own_prefix).read_text())
    manifest_path(own_prefix).write_text(json.dumps(values | {"tokens": values["tokens"] + 1}))
    with pytest.raises(UserError, match="do not belong together"):
        open_dataset(own_prefix)
