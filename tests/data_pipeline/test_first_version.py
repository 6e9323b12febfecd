"""Folders that the first version of the code wrote open, continue and are found up to date.

first_version/ was written by commit db8fe4c: `texts` and `chats` are finished data folders with the index of a packing,
`unfinished` is a folder whose shards are all there but whose manifest is not.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.dataset import TokenDataset, build_blend
from data_pipeline.order import BlendOrder
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.index import PackingIndexBuilder
from data_pipeline.prepare.pool import WorkerPool
from data_pipeline.prepare.run import report_source
from data_pipeline.storage.manifest import load_manifest

FORM = SequenceForm(64, 8, 8, block_padding_loss=False)
KINDS = {"texts": DocumentKind.text, "chats": DocumentKind.chat}
FIRST_TOKENS = {
    "texts": [363, 170, 321, 365, 367, 366, 178, 163, 116, 108],
    "chats": [10, 185, 183, 169, 182, 299, 155, 172, 165, 184],
}
CONTENT = "65d94e3391a0a6c98ee0af3b8b2bb9332767dddd8b79be3ceffb0a866bdb56c3"  # sha256 of `texts`
FINGERPRINT = {
    "order": 1,
    "seed": 3,
    "sequence_length": 64,
    "alignment": 8,
    "isolate_documents": True,
    "overlong_chats": "truncate",
}
DATA_POSITION = {
    "seed": 3,
    "sources": [{"sha256": CONTENT, "name": "texts", "slots": 65536, "sequences": 9, "read": 0}],
    "first_sample": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy first_version/ and set its files to the times that the packing indexes remember."""
    folder = Path(shutil.copytree(Path(__file__).with_name("first_version"), tmp_path / "first_version"))
    for index in folder.glob("*/packing_*.json"):
        stamps = json.loads(index.read_text())["stamps"]
        for shard, stamp in zip(sorted(index.parent.glob("shard_*.bin")), stamps, strict=True):
            for path, time in ((shard, stamp[1]), (shard.with_suffix(".idx"), stamp[3])):
                os.utime(path, ns=(time, time))
    return folder


def prepare(folder: Path, name: str, inputs: str):
    config = PrepareConfig(workers=1, shard_bytes=700, chat_template="chatml", max_skipped_share=0.5)
    input_ = InputConfig(kind=KINDS[inputs], files=str(folder / f"{inputs}.jsonl"))
    source = SourceConfig(path=str(folder / name), input=input_)
    return report_source(name, source, DataConfig(tokenizer=str(folder / "tokenizer"), prepare=config))


def refuse_work(*arguments: object) -> None:
    raise AssertionError("this work was done by the first version already")


@pytest.mark.parametrize("name", KINDS)
def test_its_packing_is_read_not_built_again(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackingIndexBuilder, "_build", refuse_work)
    dataset = TokenDataset(folder / name, FORM, seed=1)
    assert dataset.read_segments(0).tokens[:10].tolist() == FIRST_TOKENS[name]
    counts = dataset.counts
    assert counts.block_padding_tokens > 0
    total = counts.tokens + counts.block_padding_tokens + counts.padding_tokens
    assert total == counts.sequences * FORM.sequence_length


@pytest.mark.parametrize("name", KINDS)
def test_a_packing_that_is_built_again_has_the_same_bytes(folder: Path, name: str) -> None:
    before = {path.name: path.read_bytes() for path in (folder / name).glob("packing_*")}
    for path in (folder / name).glob("packing_*"):
        path.unlink()
    TokenDataset(folder / name, FORM, seed=1)
    after = {path.name: path.read_bytes() for path in (folder / name).glob("packing_*") if path.suffix != ".lock"}
    assert after == before


@pytest.mark.parametrize("name", KINDS)
def test_its_data_are_up_to_date(folder: Path, name: str) -> None:
    before = (folder / name / "manifest.json").read_bytes()
    report = prepare(folder, name, name)
    assert report.was_up_to_date
    assert (folder / name / "manifest.json").read_bytes() == before
    manifest = load_manifest(folder / name)
    assert manifest.block_padding_token_id == {"texts": 2, "chats": 11}[name]
    assert manifest.shards[0].end_record == {"texts": 10, "chats": 6}[name]


def test_a_folder_it_began_is_finished_with_its_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerPool, "_start", lambda pool, count: None if not count else refuse_work())
    assert prepare(folder, "unfinished", "texts").skipped == {"null text": 1}
    for name in ("skipped.jsonl", "plan.json", "shard_00001_0000.json"):
        assert (folder / "unfinished" / name).read_bytes() == (folder / "texts" / name).read_bytes()
    ours, theirs = (json.loads((folder / name / "manifest.json").read_text()) for name in ("unfinished", "texts"))
    del ours["source"]["files"], theirs["source"]["files"]
    assert ours == theirs


def test_its_runs_know_the_data_and_their_order(folder: Path) -> None:
    dataset = TokenDataset(folder / "texts", FORM, seed=3)
    blend = build_blend({"texts": dataset}, {"texts": SourceConfig()}, seed=3)
    assert blend.fingerprint() == FINGERPRINT
    former = BlendOrder.from_dict(DATA_POSITION, "step_00000001")
    assert blend.order.means_the_same_as(former)
    assert json.loads(json.dumps(blend.order.to_dict())) == DATA_POSITION
    assert np.array_equal(blend.order.count_read(5), former.count_read(5))
