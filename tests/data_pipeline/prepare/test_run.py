"""A source becomes the same shards whatever its format, the number of workers and the interruptions."""

import errno
import gzip
import io
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from conf.schema import DocumentKind, Split
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.prepare.run import prepare_source, prepare_sources
from data_pipeline.storage.manifest import KEYS_ON_DISK, compute_sha256, load_manifest


def jsonl(workshop, records) -> bytes:
    return workshop.write("plain.jsonl", records).read_bytes()


def expected(tokenizer_dir: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]


def write_plain(folder: Path, content: bytes, records: list[dict]) -> None:
    (folder / "a.jsonl").write_bytes(content)


def write_gzip(folder: Path, content: bytes, records: list[dict]) -> None:
    half = content.index(b"\n", len(content) // 2) + 1
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))


def write_zstd(folder: Path, content: bytes, records: list[dict]) -> None:
    half = len(content) // 2
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(content[:half]) + zstandard.compress(content[half:]))


def write_parquet(folder: Path, content: bytes, records: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=7)


def write_saved(folder: Path, content: bytes, records: list[dict]) -> None:
    Dataset.from_list(records).save_to_disk(folder)


def write_saved_splits(folder: Path, content: bytes, records: list[dict]) -> None:
    splits = [("test", Dataset.from_list(records[:1])), ("train", Dataset.from_list(records))]
    DatasetDict(splits).save_to_disk(folder)


def write_mixture(folder: Path, content: bytes, records: list[dict]) -> None:
    lines = io.BytesIO(content).readlines()
    (folder / "a.jsonl").write_bytes(b"".join(lines[:9]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[9:15])))
    pq.write_table(pa.Table.from_pylist(records[15:30]), folder / "c.parquet")
    (folder / "d").mkdir()
    (folder / "d" / "last.jsonl").write_bytes(b"".join(lines[30:]))


WRITERS = [write_plain, write_gzip, write_zstd, write_parquet, write_saved, write_saved_splits, write_mixture]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_ids_that_transformers_encodes(
    write, workshop, records, texts, tokenizer_dir, read_documents
) -> None:
    content = jsonl(workshop, records)
    folder = workshop.folder / "formats"
    folder.mkdir()
    write(folder, content, records)
    manifest = workshop.prepare(input_={"files": str(folder)}).manifest
    assert read_documents(workshop.output) == expected(tokenizer_dir, texts)
    assert manifest.documents == len(texts)
    assert len(manifest.shards) > 1


def test_a_dataset_is_read_as_it_streams(workshop, records, texts, tokenizer_dir, read_documents) -> None:
    for half in range(2):
        workshop.write(f"train-{half}.jsonl", records[20 * half : 20 * half + 20])
    workshop.prepare(input_={"dataset": str(workshop.folder / "in"), "split": "train"}, shard_bytes=2500)
    assert read_documents(workshop.output) == expected(tokenizer_dir, texts)
    assert len(load_manifest(workshop.output).shards) > 2


def test_manifests_describe_the_files(workshop, records, texts, tokenizer_dir, read_documents) -> None:
    jsonl(workshop, records)
    manifest = workshop.prepare().manifest
    assert manifest == load_manifest(workshop.output)
    documents = read_documents(workshop.output)
    assert (manifest.documents, manifest.tokens) == (len(texts), sum(map(len, documents)))
    assert manifest.max_token_id == max(map(max, documents))
    assert manifest.tokenizer_fingerprint == read_tokenizer_info(tokenizer_dir, "<SPECIAL_100>").fingerprint
    assert (manifest.kind, manifest.dtype, manifest.block_padding_token_id) == ("text", "uint16", 2)
    end = 0
    for shard in manifest.shards:
        prefix = workshop.output / shard.name
        on_disk = {KEYS_ON_DISK.get(key, key): value for key, value in asdict(shard).items() if key != "images"}
        assert on_disk == json.loads(Path(f"{prefix}.json").read_text())
        assert shard.sha256 == compute_sha256(Path(f"{prefix}.bin"))
        assert shard.index_sha256 == compute_sha256(Path(f"{prefix}.idx"))
        assert (shard.input, shard.first_record, shard.scored_tokens) == ("plain.jsonl", end, shard.tokens)
        end = shard.end_record
    assert end == len(records)


def test_the_bytes_do_not_depend_on_the_number_of_workers(workshop, records, tree) -> None:
    content = jsonl(workshop, records)
    write_gzip(workshop.folder / "in", content[:-1] + b" \n", records)
    one, three = workshop.folder / "one", workshop.folder / "three"
    workshop.prepare(one, workers=1)
    workshop.prepare(three, workers=3)
    assert tree(one) == tree(three)


def test_text_that_spells_a_reserved_token_stays_text(workshop, tokenizer_dir, read_documents) -> None:
    text = "<s> <SPECIAL_100> </s>"
    workshop.write("a.jsonl", [{"text": text}])
    workshop.prepare()
    [ids] = read_documents(workshop.output)
    assert min(ids[:-1]) > 100
    assert AutoTokenizer.from_pretrained(tokenizer_dir).decode(ids[:-1]) == text


@pytest.mark.parametrize("write", WRITERS)
def test_held_out_records_are_those_that_training_leaves(
    write, workshop, records, texts, tokenizer_dir, read_documents
):
    content = jsonl(workshop, records)
    folder = workshop.folder / "formats"
    folder.mkdir()
    write(folder, content, records)
    found = []
    for split, shard_bytes in (("train", 3000), ("heldout", 700)):  # what is held out does not depend on the parts
        output = workshop.folder / split
        settings = {"heldout_every": 3, "shard_bytes": shard_bytes}
        workshop.prepare(output, {"files": str(folder), "records": Split(split)}, **settings)
        found.append(read_documents(output))
    train, heldout = found
    assert sorted(train + heldout) == sorted(expected(tokenizer_dir, texts))
    assert 5 <= len(heldout) <= 22  # of 40


def test_copies_that_differ_in_other_columns_are_on_one_side_in_every_format(workshop, texts, read_documents) -> None:
    copies = [{"id": number, "text": text} for number, text in enumerate(texts * 3)]
    workshop.write("lines.jsonl", copies)
    pq.write_table(
        pa.Table.from_pylist([{"text": one["text"]} for one in copies]), workshop.folder / "in" / "b.parquet"
    )
    found = {}
    for split in ("train", "heldout"):
        workshop.prepare(workshop.folder / split, {"records": Split(split)}, heldout_every=3)
        found[split] = [tuple(document) for document in read_documents(workshop.folder / split)]
    assert not set(found["train"]) & set(found["heldout"])
    assert len(found["train"]) + len(found["heldout"]) == 6 * len(texts)
    assert found["heldout"]
    assert all(count % 6 == 0 for count in Counter(found["heldout"]).values())


def test_a_split_of_the_former_rule_stays_as_it_is(workshop) -> None:
    workshop.write("a.jsonl", [{"text": f"record {i}"} for i in range(40)])
    former = {"records": Split.train}
    workshop.prepare(input_=former, heldout_every=4)
    for name in ("manifest.json", "plan.json"):  # what an earlier version wrote
        path = workshop.output / name
        values = json.loads(path.read_text())
        values.get("settings", values).pop("selection")
        path.write_text(json.dumps(values))
    assert workshop.prepare(input_=former, heldout_every=4).was_up_to_date
    (workshop.output / "manifest.json").unlink()
    with pytest.raises(UserError, match="begun with other inputs or settings: selection was None, now 2"):
        workshop.prepare(input_=former, heldout_every=4)


def test_files_shorter_than_heldout_every_hold_out_records_too(workshop) -> None:
    for number in range(4):
        workshop.write(f"{number}.jsonl", [{"text": f"record {number} {i}"} for i in range(90)])
    counts = [
        workshop.prepare(workshop.folder / split, {"records": Split(split)}, heldout_every=100).manifest.documents
        for split in ("train", "heldout")
    ]
    assert sum(counts) == 360
    assert 1 <= counts[1] <= 15


def test_records_of_which_none_is_held_out_say_so(workshop) -> None:
    workshop.write("a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"no record of .* was selected as held-out.*lower data.prepare.heldout_every"):
        workshop.prepare(input_={"records": Split.heldout}, heldout_every=1_000_000)


def test_a_second_run_does_nothing(workshop, records) -> None:
    jsonl(workshop, records)
    assert not workshop.prepare().was_up_to_date
    times = {path: path.stat().st_mtime_ns for path in workshop.output.rglob("*")}
    assert workshop.prepare(workers=3, max_skipped_share=0.5).was_up_to_date
    assert times == {path: path.stat().st_mtime_ns for path in workshop.output.rglob("*")}


def test_other_settings_and_inputs_are_refused_by_name(workshop, records) -> None:
    path = workshop.write("plain.jsonl", records)
    workshop.prepare()
    with pytest.raises(UserError, match="shard_bytes was 3000, now 4000"):
        workshop.prepare(shard_bytes=4000)
    with pytest.raises(UserError, match="column was 'text', now 'id'"):
        workshop.prepare(input_={"column": "id"})
    path.write_bytes(path.read_bytes().replace(b"function_7", b"function_8", 1))
    workshop.write("new.jsonl", records[:1])
    with pytest.raises(UserError, match=r"changed since: plain.jsonl; new: new.jsonl"):
        workshop.prepare()


def test_a_folder_with_other_files_is_refused(workshop, records) -> None:
    jsonl(workshop, records)
    workshop.output.mkdir()
    (workshop.output / "thesis.tex").touch()
    with pytest.raises(UserError, match="thesis"):
        workshop.prepare()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", [lambda data: data + b"\0\0", lambda data: data[:-1] + b"\x7f", lambda data: b""])
def test_a_shard_that_was_changed_is_noticed(workshop, records, suffix, change) -> None:
    jsonl(workshop, records)
    shard = workshop.prepare().manifest.shards[0]
    path = workshop.output / f"{shard.name}.{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path.name}.*changed.*delete {workshop.output}"):
        workshop.prepare()


def test_a_finished_dataset_that_cannot_be_written_is_up_to_date(workshop, records, monkeypatch) -> None:
    jsonl(workshop, records)
    workshop.prepare()
    (workshop.output / ".shard_00000_0000.bin.1.partial").touch()

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for function in ("mkdir", "unlink", "replace", "rename"):
        monkeypatch.setattr(os, function, refuse)
    real_open = open

    def open_to_read(path, mode="r", *arguments, **options):
        return real_open(path, mode, *arguments, **options) if set(mode) <= set("rb") else refuse()

    monkeypatch.setattr("builtins.open", open_to_read)
    assert workshop.prepare().was_up_to_date


def test_the_index_of_a_training_stays(workshop, records) -> None:
    jsonl(workshop, records)
    workshop.prepare()
    path = workshop.output / "packing_text.host.1.partial"
    path.touch()
    assert workshop.prepare().was_up_to_date
    assert path.exists()


def test_all_sources_with_an_input_are_prepared_once(workshop, records) -> None:
    jsonl(workshop, records)
    data = workshop.data()
    data.train = {"a": workshop.source(), "made": workshop.source()}
    data.train["made"].input = None
    data.heldout = {"b": workshop.source()}
    assert [report.name for report in prepare_sources(data)] == ["data.heldout.b"]
    data.heldout["b"].input.column = "id"
    with pytest.raises(UserError, match=r"data.heldout.b and data.train.a have the same path"):
        prepare_sources(data)
    data.train = data.heldout = None
    with pytest.raises(UserError, match="nothing to prepare"):
        prepare_sources(data)
    with pytest.raises(UserError, match="not both"):
        prepare_source("x", workshop.source(dataset="d", files="f"), workshop.data())


def test_chats_alternate_prompts_and_responses(workshop, read_documents) -> None:
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
    workshop.write("a.jsonl", [{"messages": messages}] * 3)
    manifest = workshop.prepare(input_={"kind": DocumentKind.chat}, chat_template="chatml").manifest
    assert (manifest.kind, manifest.documents) == ("chat", 3)
    segments = read_documents(workshop.output)
    assert len(segments) == 6
    assert manifest.shards[0].scored_tokens == sum(len(response) for response in segments[1::2])
    assert segments[1][-1] == manifest.block_padding_token_id == 11


def test_files_that_are_not_read_are_named(workshop, records) -> None:
    jsonl(workshop, records)
    (workshop.folder / "in" / "notes.txt").write_text("not a record")
    assert "1 files are not read: notes.txt" in workshop.prepare().warnings


@pytest.mark.parametrize("files", ["in", "in/*"])
def test_a_saved_dataset_among_other_files_is_refused(workshop, records, files: str) -> None:
    jsonl(workshop, records)
    write_saved(workshop.folder / "in" / "saved", b"", records)
    with pytest.raises(UserError, match="make it a source of its own"):
        workshop.prepare(input_={"files": str(workshop.folder / files)})
