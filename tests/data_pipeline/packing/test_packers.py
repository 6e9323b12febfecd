"""Every document is read once per epoch, whole or cut by rule; what is left out is counted."""

import gc
import os
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conf.schema import OverlongChat
from conf.system.errors import UserError
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing import packers as packing
from data_pipeline.packing import windows
from data_pipeline.packing.counts import PackingCounts
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments
from data_pipeline.storage.tokens import MAX_OPEN_SHARDS
from tests.helpers.stored import Document, random_chats, random_texts, write_dataset

LENGTH, BLOCK = 64, 8
FIELDS = ("tokens", "document_ids", "block_ids", "position_ids", "loss_mask", "block_padding")
TEXTS = [random_texts(50, 90), random_texts(3, 300, seed=1), random_texts(40, 6, seed=2)]
CHATS = [random_chats(60, 9), random_chats(45, 20, seed=1)]


@pytest.fixture(autouse=True)
def small_windows_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CHATS_PER_WINDOW", 16)
    monkeypatch.setattr(packing, "DOCUMENTS_PER_CHUNK", 7)


def open_in_order(path: Path, alignment: int = BLOCK, **form: object) -> TokenDataset:
    return TokenDataset(path, SequenceForm(LENGTH, BLOCK, alignment, **form), seed=1, shuffle=False)  # type: ignore[arg-type]


def read_epoch(dataset: TokenDataset) -> tuple[list[Segments], list[SimpleNamespace]]:
    """Return the segments of every sequence, and its arrays [S]."""
    places = range(dataset.num_sequences)
    batches = [dataset.build_sequence(place) for place in places]
    sequences = [SimpleNamespace(**{name: getattr(batch, name)[0].numpy() for name in FIELDS}) for batch in batches]
    return [dataset.read_segments(place) for place in places], sequences


def check_counts(counts: PackingCounts, sequences: list[SimpleNamespace], documents: list[Document]) -> None:
    """Compare the counts with counting in the sequences themselves, and with what is on disk."""
    is_padding = np.concatenate([sequence.document_ids < 0 for sequence in sequences])
    block_padding = np.concatenate([sequence.block_padding for sequence in sequences])
    assert counts.sequences == len(sequences)
    assert (counts.padding_tokens, counts.block_padding_tokens) == (is_padding.sum(), block_padding.sum())
    assert counts.tokens + counts.block_padding_tokens + counts.padding_tokens == len(sequences) * LENGTH
    assert counts.scored_tokens == sum((sequence.loss_mask & ~sequence.block_padding).sum() for sequence in sequences)
    on_disk = sum(len(segment) for document in documents for segment in document)
    assert counts.tokens + counts.truncated_tokens + counts.dropped_tokens == on_disk
    assert counts.documents + counts.dropped_chats == len(documents)


@pytest.mark.parametrize("alignment", [1, BLOCK])
def test_an_epoch_of_texts_is_every_token_once_in_order(tmp_path: Path, alignment: int) -> None:
    dataset = open_in_order(write_dataset(tmp_path / "d", TEXTS), alignment)
    segments, sequences = read_epoch(dataset)
    read = np.concatenate([part.tokens for part in segments])
    documents = list(chain(*TEXTS))
    assert read.tolist() == [token for document in documents for token in document[0]]
    check_counts(dataset.counts, sequences, documents)
    if alignment == 1:
        tails = sum(sequence.document_ids[-1] < 0 for sequence in sequences)
        assert tails <= len(TEXTS), "without noise only the last sequence of a shard has padding"


def test_texts_start_at_block_edges_and_at_position_0(tmp_path: Path) -> None:
    _, sequences = read_epoch(open_in_order(write_dataset(tmp_path / "d", TEXTS)))
    for sequence in sequences:
        starts = np.flatnonzero(np.diff(sequence.document_ids, prepend=-1) & (sequence.document_ids >= 0))
        assert not (starts % BLOCK).any()
        assert not sequence.position_ids[starts].any()
        for block in np.unique(sequence.block_ids):
            assert len(set(sequence.document_ids[sequence.block_ids == block]) - {-1}) <= 1


def test_without_isolation_texts_are_one_stream_without_padding(tmp_path: Path) -> None:
    dataset = open_in_order(write_dataset(tmp_path / "d", TEXTS[:1]), isolate_documents=False)
    _, sequences = read_epoch(dataset)
    check_counts(dataset.counts, sequences, TEXTS[0])
    assert dataset.counts.block_padding_tokens < BLOCK, "only where the stream ends"
    for sequence in sequences[:-1]:
        assert sequence.position_ids.tolist() == list(range(LENGTH))
        assert not sequence.document_ids.any()
        assert sequence.block_ids.tolist() == [s // BLOCK for s in range(LENGTH)]


@pytest.mark.parametrize("alignment", [1, BLOCK])
def test_chats_stay_whole_and_come_once(tmp_path: Path, alignment: int) -> None:
    documents = [chat for shard in CHATS for chat in shard if positions_of(chat, alignment) <= LENGTH]
    path = write_dataset(tmp_path / "d", [[chat for chat in shard if chat in documents] for shard in CHATS], "chat")
    dataset = open_in_order(path, alignment)
    segments, sequences = read_epoch(dataset)
    read = [chat for part in segments for chat in split_documents(part)]
    assert sorted(read) == sorted(documents)
    check_counts(dataset.counts, sequences, documents)
    assert dataset.counts.padding_tokens < 0.35 * LENGTH * len(sequences)


def test_long_chats_are_truncated_after_a_response_token(tmp_path: Path) -> None:
    documents = list(chain(*CHATS))
    dataset = open_in_order(write_dataset(tmp_path / "d", CHATS, "chat"))
    segments, sequences = read_epoch(dataset)
    check_counts(dataset.counts, sequences, documents)
    assert dataset.counts.truncated_chats > 3
    by_start = {tuple(document[0]): document for document in documents}
    for chat in (chat for part in segments for chat in split_documents(part)):
        original = by_start[tuple(chat[0])]
        assert len(chat) % 2 == 0 and chat[-1]
        assert chat[:-1] == original[: len(chat) - 1]
        assert chat[-1] == original[len(chat) - 1][: len(chat[-1])]


def test_long_chats_are_dropped_if_so_configured(tmp_path: Path) -> None:
    documents = list(chain(*CHATS))
    dataset = open_in_order(write_dataset(tmp_path / "d", CHATS, "chat"), overlong_chats=OverlongChat.drop)
    _, sequences = read_epoch(dataset)
    check_counts(dataset.counts, sequences, documents)
    assert dataset.counts.truncated_chats == 0
    assert dataset.counts.dropped_chats == sum(positions_of(chat, BLOCK) > LENGTH for chat in documents)


def test_a_chat_whose_first_response_does_not_fit_is_dropped(tmp_path: Path) -> None:
    documents = [[[5] * LENGTH, [6, 7]], [[5] * 3, [6, 7]]]
    dataset = open_in_order(write_dataset(tmp_path / "d", [documents], "chat"))
    assert (dataset.counts.dropped_chats, dataset.counts.dropped_tokens) == (1, LENGTH + 2)
    only_long = write_dataset(tmp_path / "long", [documents[:1]], "chat")
    with pytest.raises(UserError, match="no chat fits into"):
        open_in_order(only_long)


def test_the_index_costs_at_most_16_bytes_per_sequence(tmp_path: Path) -> None:
    for name, shards, kind in (("texts", TEXTS, "text"), ("chats", CHATS, "chat")):
        path = write_dataset(tmp_path / name, shards, kind)
        dataset = open_in_order(path)
        size = sum(file.stat().st_size for file in path.glob("*.entries"))
        assert 0 < size <= 16 * dataset.num_sequences


def test_the_index_is_built_once_and_again_when_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(tmp_path / "d", TEXTS)
    tokens = [part.tokens.tolist() for part in read_epoch(open_in_order(path))[0]]
    builds = []
    build = packing.TextPacker.build_entries
    monkeypatch.setattr(packing.TextPacker, "build_entries", lambda *a: builds.append(1) or build(*a))
    assert [part.tokens.tolist() for part in read_epoch(open_in_order(path))[0]] == tokens
    assert not builds
    open_in_order(path, alignment=1)
    assert len(builds) == len(TEXTS), "another form is another index"
    for file in path.glob("*.entries"):
        file.write_bytes(file.read_bytes()[:-3])
    assert [part.tokens.tolist() for part in read_epoch(open_in_order(path))[0]] == tokens
    assert len(builds) == 2 * len(TEXTS), "a broken one is built again"


def positions_of(chat: Document, alignment: int) -> int:
    return sum(-(-len(segment) // alignment) * alignment for segment in chat)


def split_documents(segments: Segments) -> list[Document]:
    """Return the chats of a sequence as lists of segments."""
    parts = np.split(segments.tokens, np.cumsum(segments.lengths)[:-1])
    documents: list[Document] = [[] for _ in range(int(segments.documents.max()) + 1)]
    for part, number in zip(parts, segments.documents, strict=True):
        documents[number].append(part.tolist())
    return documents


def test_a_cached_window_neither_holds_its_shard_open_nor_is_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_shards = MAX_OPEN_SHARDS + 2
    chats = open_in_order(write_dataset(tmp_path / "chats", [random_chats(2, 9, n) for n in range(num_shards)], "chat"))
    tokens = [part.tokens.tolist() for part in read_epoch(chats)[0]]
    assert count_open_files(tmp_path / "chats") > 0
    open_in_order(write_dataset(tmp_path / "texts", [random_texts(2, 9, n) for n in range(num_shards)]))
    assert count_open_files(tmp_path / "chats") == 0, "the shards of texts are the latest ones"

    packed = []
    pack = windows._first_fit_decreasing
    monkeypatch.setattr(windows, "_first_fit_decreasing", lambda *a: packed.append(1) or pack(*a))
    last = range(chats.num_sequences - 10, chats.num_sequences)
    assert [chats.read_segments(place).tokens.tolist() for place in last] == [tokens[place] for place in last]
    assert not packed


def count_open_files(folder: Path) -> int:
    """Return how often files of the folder are open or mapped in this process."""
    gc.collect()
    descriptors = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(f"{folder}/shard" in line for line in [*descriptors, *maps])
