"""Byte ranges end at line ends and cover the file, and reading them gives every line once."""

from pathlib import Path

import pytest

from data_pipeline.prepare.jsonl import cut_lines
from data_pipeline.prepare.part import Part, Selection, Wanted
from data_pipeline.prepare.plan import read_records

CONTENTS = {
    "ordinary": b'{"text": "a"}\n{"text": "bb"}\n{"text": "c"}\n' * 5,
    "no newline at the end": b'{"text": "a"}\n{"text": "b"}',
    "blank lines": b'\n\n{"text": "a"}\n\n\n{"text": "b"}\n\n',
    "one long line": b'{"text": "' + b"a" * 500 + b'"}\n{"text": "b"}\n',
    "carriage returns": b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
    "byte order mark": b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("shard_bytes", [1, 2, 13, 14, 15, 100, 10_000])
def test_ranges_give_every_record_once_with_its_line(tmp_path: Path, name: str, shard_bytes: int) -> None:
    content = CONTENTS[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    ranges = list(cut_lines(path, len(content), shard_bytes))
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == len(content)

    found, first_record = [], 0
    for number, (start, end) in enumerate(ranges):
        assert content[end - 1 : end] == b"\n" or end == len(content)
        part = Part("jsonl", "a", str(path), start, end, None, end - start, {}, number)
        wanted = Wanted("text", Selection("all", 2), batch_bytes=20)
        batches = list(read_records(part, wanted, skip=0))
        found += [(first_record + n, v) for b in batches for n, v in zip(b.numbers, b.values, strict=True)]
        assert sum(batch.progress for batch in batches) == end - start
        first_record += batches[-1].end
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    wanted_records = [(i, line.split(b'"')[3].decode()) for i, line in enumerate(lines) if line.strip()]
    assert found == wanted_records
