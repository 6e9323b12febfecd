"""Unusable input is an error or a counted skip, with file and line; too many skips are an error."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.system.errors import UserError
from data_pipeline.encoder import Skip
from data_pipeline.prepare import jsonl
from data_pipeline.prepare.part import Selection, Wanted
from data_pipeline.prepare.plan import plan_source, read_records

GOOD = [{"text": f"line number {i}"} for i in range(200)]
GOOD_LINE = json.dumps(GOOD[0]).encode() + b"\n"
BAD_LINES = {
    "broken JSON": b'{"text": "a',
    "record is no JSON object": b'["text"]',
    "no column 'text'": b'{"body": "a"}',
    "null text": b'{"text": null}',
    "text is not a string": b'{"text": 3}',
    "empty text": b'{"text": ""}',
    "invalid UTF-8": b'{"text": "\xff"}',
}


def lines_of(records: list[dict]) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def skipped_records(workshop) -> list[dict]:
    return [json.loads(line) for line in (workshop.output / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bad_lines_are_counted_and_listed_with_file_and_line(workshop, suffix) -> None:
    lines = lines_of(GOOD)
    for place, line in enumerate(BAD_LINES.values()):
        lines.insert(20 * place + 1, line)
    lines.insert(3, b"  ")  # blank: no record, no error
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix.removeprefix(".jsonl")]
    workshop.write("a" + suffix, packed(b"\n".join(lines)))
    report = workshop.prepare(max_skipped_share=0.1, shard_bytes=700)
    assert report.manifest.documents == len(GOOD)
    assert report.skipped == dict.fromkeys(sorted(BAD_LINES), 1)
    found = [(record["file"], record["line"], record["reason"]) for record in skipped_records(workshop)]
    assert found == [("a" + suffix, lines.index(line) + 1, reason) for reason, line in BAD_LINES.items()]
    assert report.manifest.source["num_rows"] == len(GOOD) + len(BAD_LINES)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e400", b'"\\ud800"', b"1" * 400])
def test_what_is_no_json_counts_only_in_the_column_that_is_read(workshop, number) -> None:
    lines = [b'{"score": %b, "text": "a"}' % number, b'{"text": "b", "more": {"scores": [%b]}}' % number]
    workshop.write("a.jsonl", b"\n".join([*lines, b'{"text": %b}' % number, *lines_of(GOOD)]))
    report = workshop.prepare(max_skipped_share=0.1)
    assert report.manifest.documents == len(GOOD) + 2
    assert len(report.skipped) == 1
    [record] = skipped_records(workshop)
    assert (record["line"], record["reason"]) in [
        (3, "broken JSON"),
        (3, "invalid UTF-8"),
        (3, "text is not a string"),
    ]


def test_more_than_the_allowed_share_is_an_error_that_a_larger_share_resolves(workshop) -> None:
    workshop.write("a.jsonl", b"\n".join([*lines_of(GOOD), b"{"]))
    with pytest.raises(UserError, match=r"1 of 201 records.*max_skipped_share=0.001(.|\n)*a.jsonl:201: broken JSON"):
        workshop.prepare()
    times = {path: path.stat().st_mtime_ns for path in workshop.output.glob("*.bin")}
    assert workshop.prepare(max_skipped_share=0.01).skipped == {"broken JSON": 1}
    assert times == {path: path.stat().st_mtime_ns for path in workshop.output.glob("*.bin")}


def test_bad_records_at_the_beginning_do_not_end_a_run_that_is_good_in_all(workshop) -> None:
    workshop.write("a.jsonl", b"\n".join([b"{" * 600] * 150 + lines_of(GOOD) * 15))
    report = workshop.prepare(shard_bytes=20_000, max_skipped_share=0.1)
    assert report.skipped == {"broken JSON": 150}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("shard_bytes", [100, 1000, 100_000])
def test_a_line_that_is_too_long_is_skipped_without_being_held(workshop, suffix, shard_bytes, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "LARGEST_LINE_BYTES", 500)
    monkeypatch.setattr(jsonl, "READ_CHUNK_BYTES", 100)
    long_line = json.dumps({"text": "a" * 1000}).encode()
    content = b"\n".join([long_line, *lines_of(GOOD[:5]), long_line, *lines_of(GOOD[5:10]), long_line])
    path = workshop.write("a" + suffix, gzip.compress(content) if suffix.endswith("gz") else content)
    values = []
    for part in plan_source(workshop.source().input, "text", shard_bytes).parts:
        for batch in read_records(part, Wanted("text", Selection("all", 2), 2000), skip=0):
            values += batch.values
    too_long = Skip("line too long", "more than 500 bytes")
    texts = [record["text"] for record in GOOD[:10]]
    assert values == [too_long, *texts[:5], too_long, *texts[5:], too_long], path


@pytest.mark.parametrize("content", [b"", GOOD_LINE[:-1], GOOD_LINE * 2, b"x" * 1000])
def test_a_file_that_changes_while_it_is_read_is_an_error(workshop, content) -> None:
    path = workshop.write("a.jsonl", GOOD_LINE + b'{"text": "b"}\n')
    for shard_bytes in (1, 1000):
        path.write_bytes(GOOD_LINE + b'{"text": "b"}\n')
        *_, part = plan_source(workshop.source().input, "text", shard_bytes).parts
        path.write_bytes(content)
        if len(content) == part.end - part.start:
            continue
        with pytest.raises(UserError, match=r"a.jsonl changed while it was read"):
            list(read_records(part, Wanted("text", Selection("all", 2), 2000), skip=0))


def test_a_window_larger_than_zstandard_allows_by_itself_is_read(workshop) -> None:
    text = json.dumps(GOOD[0]).encode() + b"\n"
    window = bytes([0x00, (28 - 10) << 3])  # 2**28 bytes, with no size of the content (RFC 8878, 3.1.1.1)
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text  # raw, the last one
    workshop.write("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + window + block)
    assert workshop.prepare().manifest.documents == 1


def test_a_folder_of_lines_with_a_state_beside_them_is_no_saved_dataset(workshop) -> None:
    workshop.write("a.jsonl", GOOD)
    workshop.write("state.json", b"{}")
    assert workshop.prepare().manifest.documents == len(GOOD)


def test_a_wrong_column_is_an_error_that_lists_the_columns(workshop) -> None:
    workshop.write("a.jsonl", [{"body": "a", "id": 1}])
    with pytest.raises(UserError, match="no column 'text' but body, id"):
        workshop.prepare()
    pq.write_table(pa.table({"body": ["a"]}), workshop.folder / "b.parquet")
    with pytest.raises(UserError, match="no column 'text' but body"):
        workshop.prepare(input_={"files": str(workshop.folder / "b.parquet")})


def test_parquet_nulls_and_broken_utf8_are_skipped_by_record(workshop) -> None:
    broken = pa.array([b"good", None, b"\xff", b"good"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), workshop.write("a.parquet", b""))
    assert workshop.prepare(max_skipped_share=0.5).skipped == {"invalid UTF-8": 1, "null text": 1}
    assert [(record["row"], record["reason"]) for record in skipped_records(workshop)] == [
        (1, "null text"),
        (2, "invalid UTF-8"),
    ]


def test_an_empty_file_is_a_warning_and_nothing_else_an_error(workshop) -> None:
    workshop.write("a.jsonl", b"")
    with pytest.raises(UserError, match="holds no document"):
        workshop.prepare()
    shutil.rmtree(workshop.output)
    workshop.write("b.jsonl", GOOD)
    [warning] = workshop.prepare().warnings
    assert "a.jsonl is empty" in warning


def test_a_duplicate_shard_is_an_error_naming_both(workshop) -> None:
    workshop.write("a.jsonl", GOOD)
    workshop.write("copy.jsonl", GOOD)
    with pytest.raises(UserError, match=r"a.jsonl and .*copy.jsonl are the same"):
        workshop.prepare()


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_was_cut_off_is_an_error(workshop, suffix) -> None:
    content = b"\n".join(lines_of(GOOD))
    whole = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress, "parquet": parquet_of}[suffix](content)
    workshop.write(f"a.{suffix}", whole[:-20])
    with pytest.raises(UserError, match=rf"a.{suffix} is damaged"):
        workshop.prepare()


def parquet_of(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": content.decode().split("\n")}), sink)
    return sink.getvalue().to_pybytes()


def test_a_path_that_is_not_there_or_not_ours_is_an_error(workshop) -> None:
    with pytest.raises(UserError, match="does not exist"):
        workshop.prepare(input_={"files": str(workshop.folder / "nowhere")})
    path = workshop.write("a.csv", b"text\n")
    with pytest.raises(UserError, match=r"reads .jsonl"):
        workshop.prepare(input_={"files": str(path)})
    with pytest.raises(UserError, match=r"holds no file named \*.jsonl"):
        workshop.prepare()
    with pytest.raises(UserError, match="matches no file"):
        workshop.prepare(input_={"files": str(workshop.folder / "*.jsonl")})


def test_a_glob_takes_what_it_matches(workshop) -> None:
    for number in range(3):
        workshop.write(f"part-{number}.jsonl", [{"text": f"{number}"}])
    manifest = workshop.prepare(input_={"files": str(workshop.folder / "*" / "part-[02].jsonl")}).manifest
    assert [shard.input for shard in manifest.shards] == ["in/part-0.jsonl", "in/part-2.jsonl"]


def test_a_dataset_that_cannot_be_loaded_is_an_error(workshop) -> None:
    with pytest.raises(UserError, match=r"nowhere .*cannot be loaded"):
        workshop.prepare(input_={"dataset": str(workshop.folder / "nowhere")})
    workshop.write("train.jsonl", GOOD)
    with pytest.raises(UserError, match="no split 'test' but train"):
        workshop.prepare(input_={"dataset": str(workshop.folder / "in"), "split": "test"})
