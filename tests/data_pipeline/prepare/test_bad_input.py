"""What cannot be used is an error or a counted skip, with file and line; too many skips are an error."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.errors import UserError

GOOD = [{"text": f"line number {i}"} for i in range(200)]
BAD_LINES = {
    "broken JSON": b'{"text": "a',
    "row is no JSON object": b'["text"]',
    "no column 'text'": b'{"body": "a"}',
    "null text": b'{"text": null}',
    "text is not a string": b'{"text": 3}',
    "empty text": b'{"text": ""}',
    "invalid UTF-8": b'{"text": "\xff"}',
}


def lines_of(rows: list[dict]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def skipped_rows(workshop) -> list[dict]:
    return [json.loads(line) for line in (workshop.output / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bad_lines_are_counted_and_listed_with_file_and_line(workshop, suffix) -> None:
    lines = lines_of(GOOD)
    for place, line in enumerate(BAD_LINES.values()):
        lines.insert(20 * place + 1, line)
    lines.insert(3, b"  ")  # blank: no row, no error
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix.removeprefix(".jsonl")]
    workshop.write("a" + suffix, packed(b"\n".join(lines)))
    report = workshop.prepare(max_skipped_share=0.1, shard_bytes=700)
    assert report.manifest.documents == len(GOOD)
    assert report.skipped == dict.fromkeys(sorted(BAD_LINES), 1)
    found = [(row["file"], row["line"], row["reason"]) for row in skipped_rows(workshop)]
    assert found == [("a" + suffix, lines.index(line) + 1, reason) for reason, line in BAD_LINES.items()]
    assert report.manifest.source["num_rows"] == len(GOOD) + len(BAD_LINES)


def test_more_than_the_allowed_share_is_an_error_that_a_larger_share_resolves(workshop) -> None:
    workshop.write("a.jsonl", b"\n".join([*lines_of(GOOD), b"{"]))
    with pytest.raises(UserError, match=r"1 of 201 rows.*max_skipped_share=0.001(.|\n)*a.jsonl:201: broken JSON"):
        workshop.prepare()
    times = {path: path.stat().st_mtime_ns for path in workshop.output.glob("*.bin")}
    assert workshop.prepare(max_skipped_share=0.01).skipped == {"broken JSON": 1}
    assert times == {path: path.stat().st_mtime_ns for path in workshop.output.glob("*.bin")}


def test_a_hopeless_input_stops_early_and_names_true_lines(workshop) -> None:
    workshop.write("a.jsonl", b"\n".join(lines_of(GOOD) * 5 + [b"{"] * 2000))
    with pytest.raises(UserError, match=r"a.jsonl:1001: broken JSON"):
        workshop.prepare(shard_bytes=2500)
    assert not (workshop.output / "skipped.jsonl").exists()  # which the end of a run writes


def test_a_wrong_column_is_an_error_that_lists_the_columns(workshop) -> None:
    workshop.write("a.jsonl", [{"body": "a", "id": 1}])
    with pytest.raises(UserError, match="no column 'text' but body, id"):
        workshop.prepare()
    pq.write_table(pa.table({"body": ["a"]}), workshop.folder / "b.parquet")
    with pytest.raises(UserError, match="no column 'text' but body"):
        workshop.prepare(input_={"files": str(workshop.folder / "b.parquet")})


def test_parquet_nulls_and_broken_utf8_are_skipped_by_row(workshop) -> None:
    broken = pa.array([b"good", None, b"\xff", b"good"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), workshop.write("a.parquet", b""))
    assert workshop.prepare(max_skipped_share=0.5).skipped == {"invalid UTF-8": 1, "null text": 1}
    assert [(row["row"], row["reason"]) for row in skipped_rows(workshop)] == [(1, "null text"), (2, "invalid UTF-8")]


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
