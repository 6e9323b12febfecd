"""Every picture is stored once in a dataset, whose bytes are the same whoever did what and whatever ended it."""

import base64
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from conf.schema import Split
from conf.system.errors import UserError
from data_pipeline.prepare import image_sharing
from data_pipeline.prepare.part import Selection
from data_pipeline.prepare.plan import plan_source
from data_pipeline.prepare.shards import Job, TokenizeTask, load_complete_shards, tokenize_part
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.tokens import StoredTokens
from data_pipeline.toy.tokenizer import MASK_TOKEN
from tests.helpers.pictures import ImageWorkshop, ask, make_picture

ROOT = Path(__file__).resolve().parents[3]
PICTURES = [make_picture(30 + i, 40, i) for i in range(40)]
NUMBER = 60
SHARD_BYTES = 20_000
# Record i shows picture i mod 40, and every third one a second that all of them share.
SHOWN = [[PICTURES[i % 40], *([PICTURES[0]] if i % 3 == 0 else [])] for i in range(NUMBER)]


def turn(number: int) -> list[dict[str, str]]:
    return [{"user": f"What is {number}?", "assistant": "It is green."}]


def record(number: int) -> dict[str, Any]:
    return {"images": [{"bytes": data} for data in SHOWN[number]], "texts": turn(number)}


@pytest.fixture
def corpus(image_workshop: ImageWorkshop) -> ImageWorkshop:
    """Write three parquet files and a .jsonl, some 30 shards."""
    for number in range(3):
        records = [record(i) for i in range(15 * number, 15 * number + 15)]
        path = image_workshop.input / f"{number}.parquet"
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=4)
    lines = [
        {"texts": turn(i), "images": [base64.b64encode(data).decode() for data in SHOWN[i]]} for i in range(45, NUMBER)
    ]
    image_workshop.write_lines(lines, "z.jsonl")
    return image_workshop


def prepare(corpus: ImageWorkshop, output: Path | None = None, **settings: Any):
    return corpus.prepare(output, {"column": "texts"}, **({"shard_bytes": SHARD_BYTES} | settings))


def read_tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def undisturbed(corpus: ImageWorkshop) -> dict[str, bytes]:
    output = corpus.folder / "undisturbed"
    prepare(corpus, output, workers=2)
    content = read_tree(output)
    assert not any("work" in name or "partial" in name for name in content)
    return content


def test_a_picture_is_stored_once_in_the_first_shard_that_shows_it(corpus: ImageWorkshop) -> None:
    manifest = prepare(corpus, workers=2).manifest
    assert len(manifest.shards) > 8
    assert manifest.images == sum(map(len, SHOWN))
    stored = StoredTokens(corpus.output)
    images = b"".join((corpus.output / f"{shard.name}.images").read_bytes() for shard in manifest.shards)
    assert len(images) == sum(len(data) for data in PICTURES)
    shown, first_shard = [], {}
    for number, shard in enumerate(manifest.shards):
        references = stored.open_shard(number).images
        assert references is not None and shard.images is not None
        shown += [image.read() for image in stored.list_images(references.all)]
        for reference in references.all:
            first = first_shard.setdefault(reference["sha256"].tobytes(), number)
            assert reference["shard"] == first
        content = (corpus.output / f"{shard.name}.images").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.images.num_bytes, shard.images.sha256)
        content = (corpus.output / f"{shard.name}.references").read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.images.references_sha256
    assert shown == [data for pictures in SHOWN for data in pictures]
    assert any(shard.images and not shard.images.num_bytes for shard in manifest.shards), "all of theirs are elsewhere"


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus: ImageWorkshop, workers: int) -> None:
    prepare(corpus, workers=workers)
    assert read_tree(corpus.output) == undisturbed(corpus)


def start(corpus: ImageWorkshop) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "data_pipeline.prepare", "data=images", f"data.tokenizer={corpus.tokenizer_dir}"),
        *(f"data.train.images.path={corpus.output}", f"data.train.images.input.files={corpus.input}"),
        *("data.train.images.input.column=texts", "data.prepare.chat_template=chatml", "data.prepare.workers=2"),
        f"data.prepare.shard_bytes={SHARD_BYTES}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_shards(process: subprocess.Popen, output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(output.glob(".work/shard_*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_runs_continue_to_the_same_bytes(corpus: ImageWorkshop) -> None:
    process = start(corpus)
    wait_for_shards(process, corpus.output, 1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(corpus)
    wait_for_shards(process, corpus.output, 4)
    [worker, *_] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert b"died (exit status -9" in process.communicate(timeout=60)[0]
    prepare(corpus, workers=3)
    assert read_tree(corpus.output) == undisturbed(corpus)


@pytest.mark.parametrize("function", ["_compact", "_refer"])
def test_a_run_that_ends_while_pictures_are_shared_continues(
    corpus: ImageWorkshop, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(corpus)
    own = getattr(image_sharing, function)
    for number in (0, 3, 7):
        left = number

        def end(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return own(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(image_sharing, function, end)
            prepare(corpus)
    prepare(corpus)
    assert read_tree(corpus.output) == expected


def test_a_file_that_changed_before_the_end_is_named(corpus: ImageWorkshop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(image_sharing, "_find_owners", lambda hashes: 1 / 0)
        prepare(corpus)
    path = max(corpus.output.glob("*.images"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name} was changed after it was made"):
        prepare(corpus)


def test_a_finished_dataset_is_up_to_date_until_a_file_changes(corpus: ImageWorkshop) -> None:
    prepare(corpus)
    assert prepare(corpus).was_up_to_date
    path = min(corpus.output.glob("*.references"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{path.name} is not what .* describes"):
        prepare(corpus)
    path.write_bytes(content)
    path = min(corpus.output.glob("*.images"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name} has \d+ bytes, .* describes"):
        prepare(corpus)


def test_another_column_of_images_is_another_dataset(corpus: ImageWorkshop) -> None:
    prepare(corpus)
    with pytest.raises(UserError, match="images was 'images', now 'other'"):
        corpus.prepare(None, {"column": "texts", "images": "other"}, shard_bytes=SHARD_BYTES)


def write_lines(folder: Path) -> str:
    lines = [{"texts": turn(i), "images": [base64.b64encode(d).decode() for d in SHOWN[i]]} for i in range(NUMBER)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_compressed(folder: Path) -> str:
    path = Path(write_lines(folder)).with_name("a.jsonl.gz")
    path.write_bytes(gzip.compress(path.with_name("a.jsonl").read_bytes()))
    return str(path)


def write_parquet(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist([record(i) for i in range(NUMBER)]), folder / "a.parquet", row_group_size=17)
    return str(folder / "a.parquet")


def write_saved(folder: Path) -> str:
    Dataset.from_list([record(i) for i in range(NUMBER)]).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def write_tar(folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, pictures in enumerate(SHOWN):
            files = {f"{number}.{i}.png": data for i, data in enumerate(pictures)}
            for name, data in (files | {f"{number}.json": json.dumps({"texts": turn(number)}).encode()}).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder / "a.tar")


@pytest.mark.parametrize("write", [write_lines, write_compressed, write_parquet, write_saved, write_tar])
def test_a_part_continues_at_each_of_its_shards(image_workshop: ImageWorkshop, write: Callable[[Path], str]) -> None:
    source = image_workshop.source(files=write(image_workshop.input), column="texts")
    [part] = plan_source(source.input, "texts", 1 << 30).parts
    directory, selection = image_workshop.folder / "whole", Selection("train", 4)
    tokenizer_dir = image_workshop.tokenizer_dir

    def tokenize(directory: Path, number: int, skip: int) -> None:
        directory.mkdir()
        job = Job(
            *(directory, "image_chat", tokenizer_dir, MASK_TOKEN, "chatml", "texts", selection, 40_000, "uint16"),
            images_column="images",
        )
        tokenize_part(job, TokenizeTask(part, number, skip), encoder, lambda advance: None)

    encoder = Job(
        *(directory, "image_chat", tokenizer_dir, MASK_TOKEN, "chatml", "texts", selection, 40_000, "uint16"),
    ).build_encoder()
    tokenize(directory, 0, 0)
    shards = load_complete_shards(directory, part.number)
    assert len(shards) > 3 and 20 < sum(shard.num_records for shard in shards) < NUMBER
    assert shards[-1].end_record == NUMBER and shards[-1].is_last
    assert len({shard.contents.sha256 for shard in shards}) == len(shards)
    for number, shard in enumerate(shards[1:], start=1):
        continued = image_workshop.folder / f"from_{number}"
        tokenize(continued, number, shard.first_record)
        found = {name: data for name, data in read_tree(continued).items()}
        notes = {name for name in found if name.endswith(".json")}
        assert {name: data for name, data in read_tree(directory).items() if name in found and name not in notes} == {
            name: data for name, data in found.items() if name not in notes
        }
        assert [s.contents for s in shards[number:]] == [
            load_complete_shards_from(continued, part.number, n) for n in range(number, len(shards))
        ]


def load_complete_shards_from(directory: Path, part: int, number: int) -> Any:
    from data_pipeline.prepare.shards import _note_path, _read_note, shard_name

    return _read_note(json.loads(_note_path(directory, shard_name(part, number)).read_text())).contents


def test_held_out_records_are_the_same_in_every_format_and_by_their_pictures(image_workshop: ImageWorkshop) -> None:
    counts, sides = {}, []
    for write in (write_lines, write_parquet, write_tar):
        folder = image_workshop.folder / write.__name__
        folder.mkdir()
        files, found = write(folder), {}
        for split in (Split.train, Split.heldout):
            output = image_workshop.folder / f"{write.__name__}_{split.value}"
            input_ = {"files": files, "column": "texts", "records": split}
            found[split] = image_workshop.prepare(output, input_, heldout_every=3).manifest
        counts[write] = [found[split].documents for split in found]
        sides.append([[shard.sha256 for shard in found[split].shards] for split in found])
    assert sides[0] == sides[1] == sides[2]
    train, heldout = counts[write_lines]
    assert train + heldout == NUMBER and heldout > 5


def test_the_same_question_about_other_pictures_may_be_on_another_side(image_workshop: ImageWorkshop) -> None:
    records = []
    for number in range(30):
        picture = base64.b64encode(PICTURES[number]).decode()
        records.append({"messages": ask({"type": "image", "base64": picture}, "What?")})
    image_workshop.write_lines(records)
    manifest = image_workshop.prepare(input_={"records": Split.heldout}, heldout_every=3).manifest
    assert 0 < manifest.documents < 30


def test_the_identity_of_the_data_covers_the_pictures(image_workshop: ImageWorkshop) -> None:
    identities = set()
    for number in range(2):
        path = image_workshop.folder / f"{number}.jsonl"
        picture = base64.b64encode(make_picture(30, 30, number)).decode()
        path.write_text(json.dumps({"messages": ask({"type": "image", "base64": picture}, "What?")}) + "\n")
        output = image_workshop.folder / str(number)
        image_workshop.prepare(output, {"files": str(path)})
        manifest = load_manifest(output)
        identities.add(manifest.sha256)
        assert manifest.shards[0].sha256 == load_manifest(image_workshop.folder / "0").shards[0].sha256
    assert len(identities) == 2
