"""Sequences come once per epoch in an order of their own; unusable data are refused in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conf.system.errors import UserError
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing.form import SequenceForm
from data_pipeline.storage.checks import verify_shard
from data_pipeline.storage.index_file import DTYPE_CODES, INDEX_HEADER, INDEX_MAGIC
from data_pipeline.storage.manifest import bin_path, index_path, load_manifest, manifest_path
from data_pipeline.storage.tokens import StoredTokens
from tests.helpers.stored import random_texts, write_dataset, write_pair

FORM = SequenceForm(32, 8, 8)
ROOT = Path(__file__).parents[2]


def open_dataset(path: Path, seed: int = 1, shuffle: bool = True) -> TokenDataset:
    return TokenDataset(path, FORM, seed, shuffle)


def shard_prefix(directory: Path) -> Path:
    return directory / load_manifest(directory).shards[0].name


def read_stored(directory: Path) -> np.ndarray:
    """Read all tokens in the order of the manifest, without our code."""
    paths = [bin_path(directory / shard.name) for shard in load_manifest(directory).shards]
    return np.concatenate([np.fromfile(path, dtype=np.uint16) for path in paths])


def test_an_epoch_holds_every_sequence_once(dataset_dir: Path) -> None:
    dataset = open_dataset(dataset_dir)
    n = dataset.num_sequences
    for epoch in (0, 1):
        places = [dataset.place(number) for number in range(epoch * n, (epoch + 1) * n)]
        assert sorted(places) == list(range(n))


def test_epochs_and_seeds_have_their_own_order(dataset_dir: Path) -> None:
    first, other = open_dataset(dataset_dir, seed=1), open_dataset(dataset_dir, seed=2)
    n = first.num_sequences
    orders = [[d.place(i + e * n) for i in range(n)] for d in (first, other) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == [open_dataset(dataset_dir, seed=1).place(i) for i in range(n)]


def test_in_order_the_sequences_are_those_of_the_files(dataset_dir: Path) -> None:
    dataset = open_dataset(dataset_dir, shuffle=False)
    tokens = np.concatenate([dataset.read_segments(dataset.place(i)).tokens for i in range(dataset.num_sequences)])
    assert np.array_equal(tokens, read_stored(dataset_dir))
    assert dataset.place(dataset.num_sequences + 3) == 3, "the next epoch starts over"


def test_token_counts_are_those_of_the_files(dataset_dir: Path) -> None:
    counts = np.bincount(read_stored(dataset_dir), minlength=370)
    assert np.array_equal(StoredTokens(dataset_dir).count_tokens(370), counts)


def test_a_pair_of_another_tool_is_read_too(tmp_path: Path) -> None:
    documents = random_texts(20, 50)
    write_pair(tmp_path / "pair", documents)
    dataset = TokenDataset(tmp_path / "pair", FORM, seed=1, shuffle=False)
    tokens = np.concatenate([dataset.read_segments(i).tokens for i in range(dataset.num_sequences)])
    assert tokens.tolist() == [token for document in documents for token in document[0]]
    assert len(dataset.stored.sha256) == 64
    write_pair(tmp_path / "other", documents[:-1])
    assert StoredTokens(tmp_path / "other").sha256 != dataset.stored.sha256


def test_a_folder_that_cannot_be_written_is_no_error(
    own_dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_dataset(own_dataset_dir, shuffle=False).read_segments(3).tokens.tolist()
    for file in own_dataset_dir.glob("packing_*"):
        file.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "elsewhere"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for _ in range(2):
        assert open_dataset(own_dataset_dir, shuffle=False).read_segments(3).tokens.tolist() == expected
    assert not list(own_dataset_dir.glob("packing_*"))
    assert len(list((tmp_path / "elsewhere").rglob("*.entries"))) == 1


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d", [random_texts(2, 20, seed) for seed in range(300)])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from data_pipeline.dataset import TokenDataset\n"
        "from data_pipeline.packing.form import SequenceForm\n"
        "dataset = TokenDataset(sys.argv[1], SequenceForm(32, 8, 8), seed=1)\n"
        "print(sum(int(dataset.build_sequence(i).loss_mask.sum()) > 0 for i in range(dataset.num_sequences)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 300


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere holds no data"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no finished dataset"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("path", [bin_path, index_path])
def test_a_missing_file_is_named(own_dataset_dir: Path, path) -> None:
    missing = path(shard_prefix(own_dataset_dir))
    missing.unlink()
    with pytest.raises(UserError, match=missing.name):
        open_dataset(own_dataset_dir)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"x" * len(data)])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_broken_index_is_named(own_dataset_dir: Path, damage, has_manifest: bool) -> None:
    index = index_path(shard_prefix(own_dataset_dir))
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(UserError, match=index.name):
        open_dataset(own_dataset_dir if has_manifest else shard_prefix(own_dataset_dir))


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data + b"\0\0"])
def test_a_shard_of_another_size_is_refused(own_dataset_dir: Path, change) -> None:
    path = bin_path(shard_prefix(own_dataset_dir))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match="was changed after it was written"):
        open_dataset(own_dataset_dir)
    with pytest.raises(UserError, match="do not belong together"):
        open_dataset(shard_prefix(own_dataset_dir))


@pytest.mark.parametrize("when", ["before it was ever read", "afterwards, with an old date"])
def test_a_changed_shard_of_the_same_size_is_refused(own_dataset_dir: Path, when: str) -> None:
    for file in own_dataset_dir.glob("packing_*"):
        file.unlink()
    path = bin_path(shard_prefix(own_dataset_dir))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    if when != "before it was ever read":
        open_dataset(own_dataset_dir)
    path.write_bytes(content)
    if when != "before it was ever read":
        os.utime(path, (1, 1))
    with pytest.raises(UserError, match="SHA-256 differs"):
        open_dataset(own_dataset_dir)
    with pytest.raises(UserError, match="SHA-256 differs"):
        verify_shard(own_dataset_dir, load_manifest(own_dataset_dir).shards[0])


def test_a_copied_dataset_is_read_once_and_then_trusted(own_dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in own_dataset_dir.glob("packing_*"):
        file.unlink()
    for file in own_dataset_dir.glob("*.bin"):
        file.touch()
    verified = []
    monkeypatch.setattr(
        "data_pipeline.storage.tokens.verify_shard", lambda directory, shard: verified.append(shard.name)
    )
    for _ in range(2):
        open_dataset(own_dataset_dir)
    assert sorted(verified) == sorted(shard.name for shard in load_manifest(own_dataset_dir).shards)


def test_an_empty_token_file_is_refused(own_dataset_dir: Path) -> None:
    path = bin_path(shard_prefix(own_dataset_dir))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes"):
        open_dataset(own_dataset_dir)
    with pytest.raises(UserError, match="is empty"):
        open_dataset(shard_prefix(own_dataset_dir))


def test_a_sequence_that_is_no_multiple_of_a_block_is_refused() -> None:
    with pytest.raises(UserError, match="block_size"):
        SequenceForm(33, 8, 8)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_ids_beyond_the_models_vocabulary_are_refused(dataset_dir: Path, has_manifest: bool) -> None:
    largest = int(np.fromfile(bin_path(shard_prefix(dataset_dir)), dtype=np.uint16).max())
    dataset = open_dataset(dataset_dir if has_manifest else shard_prefix(dataset_dir))
    dataset.check_vocabulary(largest + 1, mask_token_id=0)
    with pytest.raises(UserError, match=f"token id {largest}"):
        dataset.check_vocabulary(largest, mask_token_id=0)


def write_raw_pair(prefix: Path, tokens: np.ndarray, lengths: list[int], boundaries: list[int]) -> Path:
    """Write a pair byte by byte, as a tool with other ideas of the format might."""
    tokens.tofile(bin_path(prefix))
    counts = np.array(lengths, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)]) * tokens.dtype.itemsize
    header = INDEX_HEADER.pack(INDEX_MAGIC, 1, DTYPE_CODES[tokens.dtype.name], len(lengths), len(boundaries))
    parts = [header, counts.tobytes(), starts.astype(np.int64).tobytes(), np.array(boundaries, np.int64).tobytes()]
    index_path(prefix).write_bytes(b"".join(parts))
    return prefix


TOKENS = np.arange(1, 101, dtype=np.int32)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("tokens", "lengths", "boundaries", "message"),
    [
        (TOKENS, [40, 60], [0, 1, 2], ""),
        (TOKENS, [40, 60], [0, 1], "has 2 sequences, but the last document ends after 1"),
        (TOKENS, [40, 60], [0, 1, 3], "has 2 sequences, but the last document ends after 3"),
        (TOKENS, [40, 60], [1, 2], "documents that do not begin with the first sequence"),
        (TOKENS, [40, 60], [], "documents that do not begin with the first sequence"),
        (TOKENS, [40, 30, 20, 10], [0, 3, 1, 4], "documents that are not in order"),
        (TOKENS, [40, -10, 70], [0, 1, 2, 3], "sequences that do not lie end to end"),
        (TOKENS.astype(np.float32), [40, 60], [0, 1, 2], "holds float32 numbers, and token ids are integers"),
    ],
)
def test_an_index_of_another_tool_is_checked(
    tokens: np.ndarray, lengths: list, boundaries: list, message: str, chunk: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("data_pipeline.storage.tokens.INDEX_CHUNK", chunk)
    prefix = write_raw_pair(tmp_path / "pair", tokens, lengths, boundaries)
    if not message:
        assert open_dataset(prefix, shuffle=False).read_segments(0).tokens.tolist() == TOKENS[:32].tolist()
        return
    with pytest.raises(UserError, match=message) as error:
        open_dataset(prefix)
    assert "\n" not in str(error.value)


def test_ids_that_are_no_text_are_refused(tmp_path: Path) -> None:
    negative = TOKENS.copy()
    negative[70] = -1
    for name, tokens, message in (
        ("negative", negative, "contains token id -1: ids are not negative"),
        ("masked", TOKENS, "contains the mask token .id 90."),
    ):
        dataset = open_dataset(write_raw_pair(tmp_path / name, tokens, [100], [0, 1]))
        with pytest.raises(UserError, match=message):
            dataset.check_vocabulary(101, mask_token_id=90)
    dataset.check_vocabulary(101, mask_token_id=0)


def test_another_tokenizer_is_refused(dataset_dir: Path) -> None:
    dataset = open_dataset(dataset_dir)
    dataset.check_tokenizer(load_manifest(dataset_dir).tokenizer_fingerprint)
    with pytest.raises(UserError, match="prepare the data again"):
        dataset.check_tokenizer("another")


@pytest.mark.parametrize("text", ["{", "{}", "[]", json.dumps({"format_version": 9}), json.dumps({"tokens": 3})])
def test_a_broken_manifest_is_named(own_dataset_dir: Path, text: str) -> None:
    manifest_path(own_dataset_dir).write_text(text)
    with pytest.raises(UserError, match="manifest"):
        open_dataset(own_dataset_dir)


def test_a_shard_without_documents_is_passed_over(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d", [random_texts(5, 20), random_texts(5, 20)])
    values = json.loads(manifest_path(path).read_text())
    values["shards"][0] |= {"documents": 0, "tokens": 0}
    manifest_path(path).write_text(json.dumps(values))
    assert open_dataset(path).counts.documents == 5
