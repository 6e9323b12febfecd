"""Errors of a dataset that streams are messages, those of a connection are waited for, and it is listed once."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.system.errors import UserError
from data_pipeline.prepare import hub
from data_pipeline.prepare.part import Part, Selection, Wanted
from data_pipeline.prepare.plan import plan_source, read_records

WANTED = Wanted("text", Selection("all", 2), 100)


class TransportError(Exception):
    """Named like the error of the library that reads the hub."""


class Stream:
    """A dataset of ten records; `errors` are raised at record 4, one each time it is reached."""

    num_shards = 1

    def __init__(self, errors: list[Exception], first: int = 0) -> None:
        self.errors, self.first = errors, first

    def shard(self, num_shards: int, index: int) -> "Stream":
        return self

    def skip(self, count: int) -> "Stream":
        return Stream(self.errors, count)

    def __iter__(self):
        for number in range(self.first, 10):
            if number == 4 and self.errors:
                raise self.errors.pop(0)
            yield {"text": f"record {number}"}


def read(errors: list[Exception], monkeypatch) -> list[str]:
    monkeypatch.setattr(hub, "_open_once", lambda **options: (Stream(errors), []))
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    part = Part("hub", "web", "web, shard 0", 0, 1, 0, 0, {})
    return [value for batch in read_records(part, WANTED, skip=0) for value in batch.values]


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), TransportError()])
def test_a_lost_connection_is_opened_again_at_the_same_record(monkeypatch, error) -> None:
    assert read([error] * hub.NUM_RETRIES, monkeypatch) == [f"record {number}" for number in range(10)]
    with pytest.raises(UserError, match=r"web, shard 0, record 4 cannot be loaded: .*the same command continues"):
        read([error] * (hub.NUM_RETRIES + 1), monkeypatch)


def test_any_other_error_is_a_message_at_once(monkeypatch) -> None:
    errors: list[Exception] = [pa.ArrowInvalid("bad magic")] * 2
    with pytest.raises(UserError, match=r"web, shard 0, record 4 cannot be loaded: ArrowInvalid: bad magic"):
        read(errors, monkeypatch)
    assert len(errors) == 1


@pytest.mark.parametrize("broken", ["a.parquet", "b.parquet"])
def test_a_broken_file_of_a_folder_is_a_message(workshop, broken) -> None:
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": [name] * 9}), workshop.write(name, b""))
    workshop.write(broken, b"PAR1 but no more than this")
    with pytest.raises(UserError, match=rf"{workshop.folder / 'in'}.*cannot be loaded: ArrowInvalid"):
        workshop.prepare(input_={"dataset": str(workshop.folder / "in")})


def test_a_worker_lists_a_dataset_once(workshop, monkeypatch) -> None:
    for number in range(3):
        workshop.write(f"{number}.jsonl", [{"text": f"{number} {i}"} for i in range(5)])
    calls = []
    real = hub.load_dataset_builder
    monkeypatch.setattr(hub, "load_dataset_builder", lambda *a, **o: calls.append(a) or real(*a, **o))
    parts = plan_source(workshop.source(dataset=str(workshop.folder / "in")).input, "text", 100).parts
    texts = [value for part in parts for batch in read_records(part, WANTED, skip=0) for value in batch.values]
    assert texts == [f"{number} {i}" for number in range(3) for i in range(5)]
    assert len(calls) == 2  # by the plan and by the worker
