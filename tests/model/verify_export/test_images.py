"""An export with images passes every check, and what is wrong about its images fails the check that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model.convert.merge import merge_checkpoints
from model.convert.progress import Progress
from model.convert.refresh import Refreshed, refresh_export
from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, edit_tensors
from tests.helpers.export_checks import assert_found, find, outcomes
from tests.helpers.tiny_checkpoints import MASK_TOKEN, make_ministral3_vlm

PROJECTOR = "encoder.multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="session")
def merged(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge the export of the other tests with a vision tower. Do not change it."""
    folder = tmp_path_factory.mktemp("merged")
    make_ministral3_vlm(folder / "ministral")
    target = folder / "vlm"
    merge_checkpoints(written / "export", folder / "ministral", target, MASK_TOKEN, Progress(), max_shard_bytes=10**9)
    return target


@pytest.fixture
def vlm(merged: Path, tmp_path: Path) -> Path:
    """Make a private copy of it."""
    return Path(shutil.copytree(merged, tmp_path / "vlm"))


def test_what_the_project_merges_passes_every_check(merged: Path) -> None:
    found = verify_export(merged)
    assert {check.outcome for check in found.checks} == {CheckOutcome.passed}, outcomes(found)
    assert find(found, "tensor names").detail.startswith("54 = 9 x 4 + 3 + 9 x 1 + 6 of the vision tower")
    assert "writes one for each image" in find(found, "image tokens").detail
    assert find(found, "processor").detail == "images by mistral's rules, at most 56 pixels long"
    assert "auto_map needs 19 files" in find(found, "code is complete").detail


def edit_processor(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "processor_config.json"
        edit_json(path, image_processor=json.loads(path.read_text())["image_processor"] | changes)

    return edit


DEFECTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("tensor names", lambda d: edit_tensors(d / "model.safetensors", lambda t: t.pop(PROJECTOR)), "1 missing"),
    ("config keys", lambda d: edit_json(d / "config.json", "vision_config"), "lacks vision_config"),
    ("config keys", lambda d: edit_json(d / "config.json", architectures=["NemotronLabsDiffusionModel"]), "has arch"),
    ("model", lambda d: edit_json(d / "config.json", projector_hidden_act="relu"), "computes 'gelu' only"),
    ("processor", lambda d: (d / "processor_config.json").unlink(), "AutoProcessor needs it"),
    ("processor", edit_processor(longest_edge=84), "from 28 to 56, the most that the tower takes"),
    ("processor", edit_processor(auto_map={}), "names other classes"),
    ("code is complete", lambda d: (d / "image_tokens.py").unlink(), "missing, though auto_map needs it"),
]


@pytest.mark.parametrize(("name", "damage", "detail"), DEFECTS, ids=[f"{name}: {text}" for name, _, text in DEFECTS])
def test_a_defect_fails_the_check_that_names_it(
    vlm: Path, name: str, damage: Callable[[Path], object], detail: str
) -> None:
    damage(vlm)
    assert_found(vlm, name, CheckOutcome.failed, detail)


def test_a_tokenizer_without_names_of_images_is_refused(vlm: Path, written: Path) -> None:
    shutil.copy(written / "export" / "tokenizer.json", vlm)
    assert_found(vlm, "image tokens", CheckOutcome.failed, "has no <|image_start|> with id 18")


def test_a_template_that_places_no_images_is_a_warning(vlm: Path, written: Path) -> None:
    (vlm / "chat_template.jinja").write_text((written / "export" / "chat_template.jinja").read_text())
    assert_found(vlm, "image tokens", CheckOutcome.warned, "for two images")


def test_a_refresh_brings_code_and_processor_up_to_date(vlm: Path) -> None:
    assert refresh_export(vlm) == Refreshed([], [])
    (vlm / "SHA256SUMS").unlink()
    (vlm / "image_tokens.py").write_text("# older\n")
    (vlm / "processor_config.json").unlink()
    assert refresh_export(vlm).written == ["image_tokens.py", "processor_config.json"]
    assert not verify_export(vlm).has_failed
