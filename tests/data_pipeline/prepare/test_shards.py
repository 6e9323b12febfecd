"""A part continued at any of its shards becomes the same files."""

import gzip
from pathlib import Path

import pytest

from data_pipeline.prepare.encoders import build_text_encoder
from data_pipeline.prepare.plan import build_plan
from data_pipeline.prepare.readers import Selection
from data_pipeline.prepare.shards import Advance, Job, load_records, tokenize_part


@pytest.fixture(params=["compressed", "hub"])
def source(request, workshop, rows):
    path = workshop.write("a.jsonl", rows)
    if request.param == "hub":
        return workshop.source(dataset=str(path.parent))
    path.with_name("a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return workshop.source(files=str(path.with_name("a.jsonl.gz")))


def test_a_part_continues_at_each_of_its_shards(workshop, source, tree) -> None:
    encoder = build_text_encoder(workshop.tokenizer_dir, "<SPECIAL_100>")
    [part] = build_plan(source.input, "text", 3000).parts
    reported: list[Advance] = []

    def tokenize(directory: Path, piece: int, skip: int) -> None:
        directory.mkdir()
        selection = Selection("train", 4)
        job = Job(directory, "text", workshop.tokenizer_dir, "<SPECIAL_100>", None, "text", selection, 3000, "uint16")
        tokenize_part(job, part, piece, skip, encoder, reported.append)

    whole = workshop.folder / "whole"
    tokenize(whole, 0, 0)
    records = load_records(whole, part.number)
    assert len(records) > 2
    assert [record.is_last for record in records] == [False] * (len(records) - 1) + [True]
    assert sum(advance.tokens for advance in reported) == sum(record.facts.tokens for record in records)
    assert 0 < sum(record.rows for record in records) < 40
    for piece, record in enumerate(records):
        directory = workshop.folder / f"from_{piece}"
        tokenize(directory, piece, record.first_row)
        continued = {name: data for name, data in tree(directory).items() if not name.startswith(".work")}
        assert continued == {name: data for name, data in tree(whole).items() if name in continued}
        assert len(continued) == 2 * (len(records) - piece)
