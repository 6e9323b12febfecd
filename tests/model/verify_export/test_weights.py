"""A draft adapter inside an export: it fits, and has sums of its own."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from model.checkpoint.checksums import SUMS_NAME, write_sums
from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, edit_tensors, flip_byte
from tests.helpers.export_checks import find, outcomes


def put_adapter(export: Path, adapter: Path) -> Path:
    return Path(shutil.copytree(adapter, export / "linear_spec_lora"))


def test_an_adapter_put_into_an_export_has_its_own_sums(export: Path, adapter: Path) -> None:
    folder = put_adapter(export, adapter)
    found = verify_export(export)
    assert {check.outcome for check in found.checks} == {CheckOutcome.passed}, outcomes(found)
    assert find(found, "adapter linear_spec_lora").detail == "8 tensors = 2 x 4, rank 4, alpha 16.0"
    for directory in (export, folder):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=directory, check=True, capture_output=True)
    flip_byte(folder / "adapter_model.safetensors", -1)
    check = find(verify_export(export), "checksums")
    assert check.detail == "changed: linear_spec_lora/adapter_model.safetensors"
    (folder / "adapter_model.safetensors").unlink()
    assert find(verify_export(export), "checksums").detail == "missing: linear_spec_lora/adapter_model.safetensors"
    (folder / SUMS_NAME).write_text("x")
    assert find(verify_export(export), "checksums").detail == f"damaged: linear_spec_lora/{SUMS_NAME}"


def test_an_adapter_that_peft_wrote_gets_its_own_sums(export: Path, adapter: Path) -> None:
    before = (export / SUMS_NAME).read_text()
    folder = put_adapter(export, adapter)
    (folder / SUMS_NAME).unlink()
    assert find(verify_export(export), "checksums").outcome is CheckOutcome.warned
    assert find(verify_export(export, record_sums=True), "checksums").outcome is CheckOutcome.passed
    assert (export / SUMS_NAME).read_text() == before and (folder / SUMS_NAME).is_file()


def test_an_adapter_cannot_overrule_the_sums_of_the_export(export: Path, adapter: Path) -> None:
    folder = put_adapter(export, adapter)
    write_sums(export)  # all of it, the adapter included
    assert find(verify_export(export), "checksums").outcome is CheckOutcome.passed
    edit_json(folder / "drafter.json", step=2)
    write_sums(folder)
    detail = find(verify_export(export), "checksums").detail
    assert detail == f"changed: linear_spec_lora/{SUMS_NAME}, linear_spec_lora/drafter.json"


ADAPTER_DEFECTS: list[tuple[Callable[[Path], object], CheckOutcome, str]] = [
    (lambda d: edit_json(d / "adapter_config.json", r=8), CheckOutcome.failed, "says rank 8"),
    (lambda d: edit_json(d / "adapter_config.json", target_modules=["q_proj"]), CheckOutcome.failed, "not a drafter"),
    (lambda d: edit_json(d / "adapter_config.json", target_modules=3), CheckOutcome.failed, "it changes 3"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), CheckOutcome.failed, "has no adapter_model.safetensors"),
    (
        lambda d: edit_tensors(d / "adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])),
        CheckOutcome.failed,
        "has no tensor",
    ),
    (
        lambda d: edit_tensors(
            d / "adapter_model.safetensors", lambda t: t.update({n: w.bfloat16() for n, w in list(t.items())})
        ),
        CheckOutcome.warned,
        "its weights are BF16",
    ),
    (
        lambda d: edit_tensors(
            d / "adapter_model.safetensors", lambda t: [w.zero_() for n, w in t.items() if "_B" in n]
        ),
        CheckOutcome.failed,
        "changes nothing: in every layer lora_A or lora_B is zero",
    ),
    (lambda d: edit_json(d / "adapter_config.json", lora_alpha=0), CheckOutcome.failed, "its update is scaled by 0"),
    (
        lambda d: edit_json(d / "drafter.json", rank=4, alpha=64.0),
        CheckOutcome.failed,
        "was trained with rank 4 and alpha 64, but adapter_config.json has r 4 and lora_alpha 16.0",
    ),
    (
        lambda d: edit_tensors(
            d / "adapter_model.safetensors",
            lambda t: [t.update({n.removeprefix("base_model.model."): t.pop(n)}) for n in list(t)],
        ),
        CheckOutcome.failed,
        "PEFT finds no module for encoder.layers.0.self_attn.o_proj.lora_A.weight",
    ),
    (lambda d: d.rename(d.with_name("mine")), CheckOutcome.warned, "decoding looks in linear_spec_lora/"),
    (lambda d: (d / "adapter_config.json").unlink(), CheckOutcome.failed, "holds no adapter"),
]


@pytest.mark.parametrize(("damage", "outcome", "detail"), ADAPTER_DEFECTS)
def test_a_wrong_adapter_is_noticed(
    export: Path, adapter: Path, damage: Callable[[Path], object], outcome: CheckOutcome, detail: str
) -> None:
    damage(put_adapter(export, adapter))
    found = verify_export(export)
    check = next(check for check in found.checks if check.name.startswith("adapter"))
    assert check.outcome is outcome and detail in check.detail, outcomes(found)


def test_infinite_values_of_an_adapter_are_noticed(export: Path, adapter: Path) -> None:
    path = put_adapter(export, adapter) / "adapter_model.safetensors"
    edit_tensors(path, lambda tensors: tensors[sorted(tensors)[0]].fill_(float("inf")))
    assert "not finite: base_model" in find(verify_export(export), "values").detail
