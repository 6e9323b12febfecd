"""A part continued at any of its shards becomes the same files."""

import gzip
from pathlib import Path

import pytest

from data_pipeline.encoder import build_text_encoder
from data_pipeline.prepare.part import Selection
from data_pipeline.prepare.plan import plan_source
from data_pipeline.prepare.shards import Advance, Job, TokenizeTask, load_complete_shards, tokenize_part


@pytest.fixture(params=["compressed", "hub"])
def source(request, workshop, records):
    path = workshop.write("a.jsonl", records)
    if request.param == "hub":
        return workshop.source(dataset=str(path.parent))
    path.with_name("a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return workshop.source(files=str(path.with_name("a.jsonl.gz")))


def test_a_part_continues_at_each_of_its_shards(workshop, source, tree) -> None:
    encoder = build_text_encoder(workshop.tokenizer_dir, "<SPECIAL_100>")
    [part] = plan_source(source.input, "text", 3000).parts
    reported: list[Advance] = []

    def tokenize(directory: Path, number: int, skip: int) -> None:
        directory.mkdir()
        selection = Selection("train", 4)
        job = Job(directory, "text", workshop.tokenizer_dir, "<SPECIAL_100>", None, "text", selection, 3000, "uint16")
        tokenize_part(job, TokenizeTask(part, number, skip), encoder, reported.append)

    whole = workshop.folder / "whole"
    tokenize(whole, 0, 0)
    shards = load_complete_shards(whole, part.number)
    assert len(shards) > 2
    assert [shard.is_last for shard in shards] == [False] * (len(shards) - 1) + [True]
    assert sum(advance.tokens for advance in reported) == sum(shard.contents.tokens for shard in shards)
    assert 0 < sum(shard.num_records for shard in shards) < 40
    for number, shard in enumerate(shards):
        directory = workshop.folder / f"from_{number}"
        tokenize(directory, number, shard.first_record)
        continued = {name: data for name, data in tree(directory).items() if not name.startswith(".work")}
        assert continued == {name: data for name, data in tree(whole).items() if name in continued}
        assert len(continued) == 2 * (len(shards) - number)
