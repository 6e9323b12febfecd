"""Chats with images are the same data in every format; bad records are counted, and the others used."""

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value

from conf.schema import DocumentKind, InputConfig
from conf.system.errors import UserError
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing.form import SequenceForm
from data_pipeline.prepare.plan import plan_source
from data_pipeline.storage.tokens import StoredTokens
from tests.helpers.pictures import UNUSABLE, USABLE, ImageWorkshop, ask, make_picture

NUMBER = 12
PICTURES = [[make_picture(30 + 9 * i, 40, i), make_picture(28, 28, 100 + i)][: 1 + i % 2] for i in range(NUMBER)]
QUESTIONS = [f"What is in picture {i}?" for i in range(NUMBER)]
RESPONSES = [f"It shows {i} green things." for i in range(NUMBER)]


def turns(number: int) -> list[dict[str, str]]:
    return [{"user": QUESTIONS[number], "assistant": RESPONSES[number]}]


def chat(number: int, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return ask(*parts, QUESTIONS[number], response=RESPONSES[number])


def write_paths(workshop: ImageWorkshop) -> dict[str, Any]:
    (workshop.input / "pictures").mkdir()
    records = []
    for number, pictures in enumerate(PICTURES):
        names = [f"pictures/{number}_{i}.png" for i in range(len(pictures))]
        for name, data in zip(names, pictures, strict=True):
            (workshop.input / name).write_bytes(data)
        records.append({"messages": chat(number, [{"type": "image", "path": name} for name in names])})
    workshop.write_lines(records)
    return {}


def list_base64() -> list[dict[str, Any]]:
    return [
        {
            "messages": chat(
                number,
                [
                    {"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(data).decode()}"}}
                    for data in pictures
                ],
            )
        }
        for number, pictures in enumerate(PICTURES)
    ]


def write_base64(workshop: ImageWorkshop) -> dict[str, Any]:
    workshop.write_lines(list_base64())
    return {}


def write_compressed(workshop: ImageWorkshop) -> dict[str, Any]:
    lines = "".join(json.dumps(record) + "\n" for record in list_base64())
    (workshop.input / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return {}


def list_finevision() -> list[dict[str, Any]]:
    return [
        {"images": [{"bytes": data, "path": None} for data in pictures], "texts": turns(number), "source": "x"}
        for number, pictures in enumerate(PICTURES)
    ]


def write_finevision(workshop: ImageWorkshop) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(list_finevision()), workshop.input / "a.parquet", row_group_size=5)
    return {"column": "texts"}


def write_columns(workshop: ImageWorkshop) -> dict[str, Any]:
    records = []
    for number, pictures in enumerate(PICTURES):
        messages = chat(number, [{"type": "image"}] * len(pictures))
        messages[1]["content"] = [{"type": "text", "text": RESPONSES[number]}]  # a column has one type
        records.append({"pics": pictures, "messages": messages})
    pq.write_table(pa.Table.from_pylist(records), workshop.input / "a.parquet")
    return {"images": "pics"}


def write_saved(workshop: ImageWorkshop) -> dict[str, Any]:
    turn = {"user": Value("string"), "assistant": Value("string")}
    features = Features({"images": List(Image()), "texts": List(turn), "source": Value("string")})
    Dataset.from_list(list_finevision(), features=features).save_to_disk(str(workshop.input / "saved"))
    return {"column": "texts", "files": str(workshop.input / "saved")}


def write_hub(workshop: ImageWorkshop) -> dict[str, Any]:
    turn = {"user": Value("string"), "assistant": Value("string")}
    features = Features({"images": List(Image()), "texts": List(turn), "source": Value("string")})
    (workshop.input / "hub").mkdir()
    Dataset.from_list(list_finevision(), features=features).to_parquet(str(workshop.input / "hub" / "train.parquet"))
    return {"column": "texts", "dataset": str(workshop.input / "hub")}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(workshop: ImageWorkshop) -> dict[str, Any]:
    with tarfile.open(workshop.input / "a.tar", "w") as tar:
        for number, pictures in enumerate(PICTURES):
            for i, data in enumerate(pictures):
                add(tar, f"some/folder/{number:03d}.{i}.png", data)
            placeholders = [{"type": "image"}] * len(pictures)
            content = {"messages": chat(number, placeholders)} if number % 3 else {"messages": turns(number)}
            add(tar, f"some/folder/{number:03d}.json", json.dumps(content).encode())
            add(tar, f"some/folder/{number:03d}.cls", b"7")
    return {}


FORMATS: list[Callable[[ImageWorkshop], dict[str, Any]]] = [
    write_paths,
    write_base64,
    write_compressed,
    write_finevision,
    write_columns,
    write_saved,
    write_hub,
    write_tar,
]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_gives_the_same_tokens_and_pictures(image_workshop: ImageWorkshop, write: Any) -> None:
    report = image_workshop.prepare(input_=write(image_workshop))
    assert (report.skipped, report.warnings, report.manifest.documents) == ({}, [], NUMBER)
    assert report.manifest.images == sum(map(len, PICTURES))
    stored = StoredTokens(image_workshop.output)
    found, ids = [], []
    for number in range(stored.num_shards):
        shard = stored.open_shard(number)
        assert shard.images is not None and shard.images.num_documents == shard.num_documents
        for document in range(shard.num_documents):
            references = shard.images.read(document, document + 1)
            found.append([image.read() for image in stored.list_images(references)])
            ids.append(shard.read(document, 0, int(shard.document_lengths(document, document + 1)[0])).tolist())
    assert found == PICTURES
    reference = image_workshop.prepare(image_workshop.folder / "reference", {"files": write_reference(image_workshop)})
    expected = StoredTokens(reference.path).open_shard(0)
    lengths = expected.document_lengths(0, NUMBER)
    assert ids == [expected.read(i, 0, int(lengths[i])).tolist() for i in range(NUMBER)]


def write_reference(workshop: ImageWorkshop) -> str:
    path = workshop.folder / "reference.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in list_base64()))
    return str(path)


def test_bad_pictures_are_counted_and_listed_and_unusual_ones_fixed(image_workshop: ImageWorkshop) -> None:
    good = [{"type": "image", "base64": base64.b64encode(data).decode()} for data, _, _ in USABLE.values()]
    records = [{"messages": ask("What?"), "images": None}]
    for part in good:
        records.append({"messages": ask(part, "What?"), "images": None})
    (image_workshop.input / "pictures").mkdir()
    for number, (data, _) in enumerate(UNUSABLE.values()):
        (image_workshop.input / "pictures" / f"{number}.bad").write_bytes(data)
        named = {"type": "image", "path": f"pictures/{number}.bad"}
        records.insert(2 * number, {"messages": ask(named, "What?"), "images": None})
    image_workshop.write_lines(records)
    report = image_workshop.prepare(max_skipped_share=0.5)
    reasons = [reason for _, reason in UNUSABLE.values()]
    assert report.skipped == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert report.manifest.documents == 1 + len(USABLE)
    fixes = [fix for *_, fixes in USABLE.values() for fix in fixes]
    assert report.manifest.fixed_images == {fix: fixes.count(fix) for fix in sorted(set(fixes))}
    skipped = [json.loads(line) for line in (image_workshop.output / "skipped.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in skipped] == [(2 * i + 1, r) for i, r in enumerate(reasons)]
    with pytest.raises(UserError, match=r"records are unusable.*\n.*image cannot be decoded"):
        image_workshop.prepare(image_workshop.folder / "strict")


def test_bad_records_are_counted(image_workshop: ImageWorkshop) -> None:
    picture = base64.b64encode(PICTURES[0][0]).decode()
    part = {"type": "image", "base64": picture}
    records: list[Any] = [
        {"messages": ask(part, "fine")},
        {"messages": ask({"type": "image", "url": "https://nowhere/a.png"})},
        {"messages": ask({"type": "image"}, "no picture")},
        {"messages": ask(part, "more pictures than places"), "images": [picture]},
        {"messages": ask(part, "spelled <|image_pad|>")},
        {"messages": ask(part)[:1]},
        {"messages": ask({"type": "video"})},
        {"messages": 7},
    ]
    image_workshop.write_lines(records)
    assert image_workshop.prepare(max_skipped_share=0.9).skipped == {
        "image is on the network": 1,
        "images and placeholders do not match": 2,
        "no response": 1,
        "not a list of messages": 1,
        "null or non-string content": 1,
        "spells a reserved token": 1,
    }


def test_samples_of_a_tar_may_have_a_caption_or_nothing(image_workshop: ImageWorkshop) -> None:
    with tarfile.open(image_workshop.input / "a.tar", "w") as tar:
        add(tar, "a.jpg", PICTURES[0][0])
        add(tar, "a.txt", b" A green thing.\n")
        add(tar, "b.png", PICTURES[1][0])
        add(tar, "c.png", PICTURES[1][0])
        add(tar, "c.json", b"{broken")
        add(tar, "d.png", PICTURES[1][0])
        add(tar, "d.json", b'{"conversations": []}')
        add(tar, "e.PNG", PICTURES[1][0])
        add(tar, "e.JSON", json.dumps(turns(1)).encode())
        add(tar, "f.txt", b"\xff")
    report = image_workshop.prepare(max_skipped_share=0.9)
    assert report.skipped == {
        "broken JSON": 1,
        "invalid UTF-8": 1,
        "no column 'messages'": 1,
        "sample has neither .json nor .txt": 1,
    }
    assert (report.manifest.documents, report.manifest.images) == (2, 2)
    listed = (image_workshop.output / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == [1, 2, 3, 5]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_tar_that_was_cut_off_is_refused(image_workshop: ImageWorkshop, share: float) -> None:
    write_tar(image_workshop)
    path = image_workshop.input / "a.tar"
    path.write_bytes(path.read_bytes()[: int(share * (12 * 1024 + sum(len(p) for c in PICTURES for p in c)))])
    with pytest.raises(UserError, match=r"a\.tar is damaged, was cut off or is no plain tar file"):
        image_workshop.prepare()


def test_tars_belong_to_image_chats_alone(image_workshop: ImageWorkshop) -> None:
    write_tar(image_workshop)
    with pytest.raises(UserError, match=r"holds no file named \*\.jsonl"):
        plan_source(InputConfig(kind=DocumentKind.chat, files=str(image_workshop.input)), "messages", 1000)


def test_data_without_any_image_are_a_warning(image_workshop: ImageWorkshop) -> None:
    pq.write_table(pa.Table.from_pylist(list_finevision()), image_workshop.input / "a.parquet")
    report = image_workshop.prepare(input_={"column": "texts", "images": "picture"})
    assert report.warnings == ["no record has an image, neither in its messages nor in column picture"]


def test_pictures_beside_the_inputs_are_no_files_left_out(image_workshop: ImageWorkshop) -> None:
    write_paths(image_workshop)
    (image_workshop.input / "notes.doc").write_text("x")
    assert image_workshop.prepare().warnings == ["1 files are not read: notes.doc"]


def test_batches_hold_every_image_where_its_tokens_are(image_workshop: ImageWorkshop) -> None:
    image_workshop.prepare(input_=write_finevision(image_workshop))
    dataset = TokenDataset(image_workshop.output, SequenceForm(128, 8, 8), seed=0)
    found = []
    for number in range(dataset.num_sequences):
        batch = dataset.build_sequence(number)
        starts = np.flatnonzero(batch.tokens[0].numpy() == 18).tolist()
        assert [image.first for image in batch.images] == starts
        found += [image.stored.read() for image in batch.images]
    assert sorted(found) == sorted(data for pictures in PICTURES for data in pictures)
    assert dataset.counts.images == len(found)


def test_the_folder_names_its_files(image_workshop: ImageWorkshop) -> None:
    image_workshop.prepare(input_=write_finevision(image_workshop))
    names = {path.suffix for path in Path(image_workshop.output).iterdir() if not path.name.startswith(".")}
    assert names == {".json", ".bin", ".idx", ".images", ".references"}
