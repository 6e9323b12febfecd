"""The files of an export: unchanged since they were published, all of them, and nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

from model.checkpoint.checksums import SUMS_NAME, write_sums
from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, flip_byte
from tests.helpers.export_checks import find


def test_a_changed_weight_is_seen_by_its_sum_alone(export: Path) -> None:
    flip_byte(export / "model.safetensors", -1)
    found = verify_export(export)
    wrong = {check.name: check.detail for check in found.checks if check.outcome is not CheckOutcome.passed}
    assert wrong == {"checksums": "changed: model.safetensors"}
    (export / SUMS_NAME).write_text("nonsense")
    assert find(verify_export(export), "checksums").detail == "damaged: SHA256SUMS"


def test_missing_and_added_files_are_named(export: Path) -> None:
    (export / "README.md").write_text("mine")
    (export / "chat_template.jinja").unlink()
    check = find(verify_export(export), "checksums")
    assert check.detail == "missing: chat_template.jinja; not listed: README.md"


def test_missing_sums_are_recorded_when_nothing_fails(export: Path) -> None:
    (export / SUMS_NAME).unlink()
    assert find(verify_export(export), "checksums").outcome is CheckOutcome.warned
    edit_json(export / "config.json", mask_token_id=200)
    assert verify_export(export, record_sums=True).has_failed and not (export / SUMS_NAME).exists()
    edit_json(export / "config.json", mask_token_id=100)
    found = verify_export(export, record_sums=True)
    assert find(found, "checksums").outcome is CheckOutcome.passed
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=export, check=True, capture_output=True)
    assert SUMS_NAME in found.sums
    (export / "README.md").touch()
    assert verify_export(export, record_sums=True).has_failed  # sums that are there are never replaced


def test_a_folder_that_is_no_adapter_cannot_have_its_own_sums(export: Path) -> None:
    (export / "more").mkdir()
    (export / "more" / "code.py").touch()
    write_sums(export / "more")
    assert "not listed: more/SHA256SUMS, more/code.py" in find(verify_export(export), "checksums").detail


@pytest.mark.parametrize(("name", "target"), [("linked", "."), ("README.md", "nowhere")])
def test_links_that_sums_cannot_follow_are_refused(export: Path, name: str, target: str) -> None:
    (export / name).symlink_to(export.parent / target)
    check = find(verify_export(export), "other files")
    assert (check.outcome, check.detail) == (CheckOutcome.failed, f"link to a folder, or to nothing: {name}")


def test_what_git_and_the_hub_put_beside_an_export_is_not_part_of_it(export: Path) -> None:
    for name in (".git/HEAD", ".cache/huggingface/download/config.json.metadata"):
        (export / name).parent.mkdir(parents=True)
        (export / name).touch()
    assert not verify_export(export).has_failed
    assert find(verify_export(export), "checksums").outcome is CheckOutcome.passed


def test_files_of_the_hubs_cache_are_links_to_blobs_of_its_repository(export: Path) -> None:
    repository = export.parent / "models--them--it"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in export.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert {check.outcome for check in verify_export(snapshot).checks} == {CheckOutcome.passed}


def test_a_link_that_leaves_the_export_is_reported(export: Path) -> None:
    outside = export.parent / "private"
    outside.write_text("secret")
    (export / "NOTES.md").symlink_to(outside)
    (export / "COPY.md").symlink_to("README.md")
    (export / "README.md").touch()
    check = find(verify_export(export), "other files")
    assert (check.outcome, check.detail) == (CheckOutcome.warned, "link out of the export: NOTES.md")


def test_an_adapters_folder_under_another_name_cannot_have_its_own_sums(export: Path, adapter: Path) -> None:
    """Else whatever is put beside a configuration of PEFT would pass."""
    folder = Path(shutil.copytree(adapter, export / "more"))
    (folder / "payload.md").touch()
    write_sums(folder)
    check = find(verify_export(export), "checksums")
    assert (
        check.outcome is CheckOutcome.failed and "not listed: more/SHA256SUMS, more/adapter_config.json" in check.detail
    )
    (export / SUMS_NAME).unlink()
    found = verify_export(export, record_sums=True)
    assert find(found, "checksums").outcome is CheckOutcome.passed
    assert "more/SHA256SUMS" in (export / SUMS_NAME).read_text()
