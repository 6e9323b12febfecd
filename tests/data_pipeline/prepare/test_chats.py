"""Chats in every format: members that nobody wrote, and tools beside the messages."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from conf.schema import DocumentKind
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.prepare.part import Selection, Wanted
from data_pipeline.prepare.plan import plan_source, read_records

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}]


def chat(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    call = {"function": {"name": "add", "arguments": arguments}}
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


CHATS = [chat({"a": 1}), chat({"b": "x", "c": [1]}), chat({"c": []})]


def write_lines(folder: Path, records: list[dict[str, Any]]) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "a.jsonl")


def write_parquet(folder: Path, records: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    return str(folder / "a.parquet")


def write_saved(folder: Path, records: list[dict[str, Any]]) -> str:
    Dataset.from_list(records).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def read(workshop, files: str, wanted: Wanted) -> list[Any]:
    parts = plan_source(workshop.source(files=files).input, wanted.column, 10_000).parts
    return [value for part in parts for batch in read_records(part, wanted, skip=0) for value in batch.values]


@pytest.mark.parametrize("write", [write_lines, write_parquet, write_saved])
def test_members_that_nobody_wrote_are_absent(workshop, write, tmp_path: Path) -> None:
    files = write(tmp_path, [{"messages": messages} for messages in CHATS])
    assert read(workshop, files, Wanted("messages", Selection("all", 2), 1000, "tools")) == CHATS


def test_a_null_in_a_line_is_real(workshop, tmp_path: Path) -> None:
    files = write_lines(tmp_path, [{"messages": chat({"a": None})}])
    assert read(workshop, files, Wanted("messages", Selection("all", 2), 1000, "tools")) == [chat({"a": None})]


@pytest.mark.parametrize("write", [write_lines, write_parquet, write_saved])
def test_tools_beside_the_messages_are_read_with_them(workshop, write, tmp_path: Path) -> None:
    files = write(tmp_path, [{"messages": CHATS[0], "tools": TOOLS, "id": 3}, {"messages": CHATS[0], "tools": None}])
    values = read(workshop, files, Wanted("messages", Selection("all", 2), 1000, "tools"))
    assert values == [{"messages": CHATS[0], "tools": TOOLS}, CHATS[0]]
    assert read(workshop, files, Wanted("messages", Selection("all", 2), 1000)) == [CHATS[0]] * 2


def test_chats_with_tools_are_refused_by_chatml_and_rendered_by_a_template_that_writes_them(
    workshop,
) -> None:
    workshop.write("a.jsonl", [{"messages": CHATS[0], "tools": TOOLS}, *({"messages": CHATS[0]} for _ in range(3))])
    settings = {"input_": {"kind": DocumentKind.chat}, "max_skipped_share": 0.5}
    refused = workshop.prepare(chat_template="chatml", **settings)
    assert refused.skipped == {"rejected by the chat template": 1}
    template = workshop.folder / "tools.jinja"
    before, _, after = CHATML_PATH.read_text().partition("{%- if tools -%}")
    _, _, rest = after.partition("{%- endif -%}")
    template.write_text(before + "{%- if tools -%}{{ tools | tojson }}{%- endif -%}" + rest)
    taken = workshop.prepare(workshop.folder / "other", chat_template=str(template), **settings)
    assert taken.skipped == {}
    assert taken.manifest.documents == 4
