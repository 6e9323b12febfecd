"""Our writer's files are, byte for byte, those of megatron-core's builder."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from conf.system.errors import UserError
from data_pipeline.prepare.writer import ShardWriter
from data_pipeline.storage.index_file import choose_dtype

TEXTS = [[[5, 6, 7, 2]], [[70000 % 65500, 2]], [[2]]]
CHATS = [[[1, 2, 3], [4], [5, 6], [7, 8]], [[9], [10, 11]]]


@pytest.mark.parametrize("vocab_size", [65499, 65500, 131072])
@pytest.mark.parametrize("documents", [TEXTS, CHATS])
def test_the_bytes_are_those_of_megatron_core(tmp_path: Path, documents, vocab_size: int) -> None:
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor([*chain(*document)]), [len(segment) for segment in document])
    builder.finalize(str(tmp_path / "theirs.idx"))

    writer = ShardWriter(tmp_path / "ours", choose_dtype(vocab_size), is_chat=documents is CHATS)
    writer.add(documents[:1])
    writer.add([])
    writer.add(documents[1:])
    contents = writer.publish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    assert contents.documents == len(documents)
    assert contents.longest_document == max(sum(map(len, document)) for document in documents)
    assert contents.scored_tokens == (5 if documents is CHATS else contents.tokens)


def test_what_is_discarded_or_empty_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", "uint16", is_chat=False)
    writer.add(TEXTS)
    writer.discard()
    assert ShardWriter(tmp_path / "b", "uint16", is_chat=False).publish().documents == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        ShardWriter(tmp_path / "nowhere" / "a", "uint16", is_chat=False)
