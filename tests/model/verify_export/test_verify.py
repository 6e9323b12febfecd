"""An export of ours passes every check, and each defect, put into one for real, fails the check that names it."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import UserError
from model.checksums import SUMS_NAME, write_sums
from model.verify_export.check import Check, Outcome
from model.verify_export.verify import Verification, verify_export
from tests.helpers.edit_exports import edit_json, edit_tensors, flip_byte

MODELING = "modeling_nemotron_labs_diffusion.py"
WEIGHTS = "model.safetensors"
UP = "encoder.layers.2.mlp.up_proj.weight"


def find(found: Verification, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def outcomes(found: Verification) -> dict[str, str]:
    return {check.name: f"{check.outcome}: {check.detail}" for check in found.checks}


def assert_found(export: Path, name: str, outcome: Outcome, detail: str) -> None:
    """The check says so; and so does SHA256SUMS, whatever was changed."""
    found = verify_export(export)
    check = find(found, name)
    assert check.outcome is outcome and detail in check.detail, outcomes(found)
    assert found.has_failed and find(found, "checksums").outcome is Outcome.failed
    (export / SUMS_NAME).unlink()
    without = verify_export(export)
    assert without.has_failed is (outcome is Outcome.failed), outcomes(without)


@pytest.mark.parametrize("kind", ["export", "shards"])
def test_what_the_project_exports_passes_every_check(written: Path, kind: str) -> None:
    found = verify_export(written / kind)
    assert {check.outcome for check in found.checks} == {Outcome.passed}, outcomes(found)
    assert len(found.checks) >= 16
    assert found.sums.keys() == {path.name for path in (written / kind).iterdir()}
    assert find(found, "tensor names").detail.startswith("39 = 9 x 4 + 3")


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 4] = float("nan")


DEFECTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("tensor names", lambda d: edit_tensors(d / WEIGHTS, lambda t: t.pop(UP)), f"1 missing: {UP}"),
    ("tensor names", lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update(x=t[UP].clone())), "1 unknown: x"),
    (
        "tensor names",
        lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({"lm_head.weight": t.pop("diffusion_head.weight")})),
        "1 missing: diffusion_head.weight; 1 unknown: lm_head.weight",
    ),
    ("tensor shapes", lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({UP: t[UP].T})), f"{UP} is [48, 80]"),
    (
        "tensor formats",
        lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)})),
        f"{UP} in F8_E4M3",
    ),
    ("values", lambda d: edit_tensors(d / WEIGHTS, set_nan), f"not finite: {UP}"),
    ("weight files", lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-10]), "is cut off"),
    ("weight files", lambda d: flip_byte(d / WEIGHTS, 12), "damaged header"),
    ("weight files", lambda d: (d / WEIGHTS).unlink(), "neither model.safetensors nor"),
    ("weight files", lambda d: shutil.copy(d / WEIGHTS, d / "model-00002.safetensors"), "not named by"),
    ("config keys", lambda d: edit_json(d / "config.json", "mask_token_id"), "lacks mask_token_id"),
    (
        "config keys",
        lambda d: edit_json(d / "config.json", "rope_parameters"),
        "lacks rope_parameters, rope_parameters.",
    ),
    ("config keys", lambda d: edit_json(d / "config.json", architectures=["Other"]), "architectures ['Other']"),
    ("config keys", lambda d: (d / "config.json").write_text("{"), "is damaged"),
    ("config keys", lambda d: (d / "config.json").unlink(), "config.json is missing"),
    ("model", lambda d: edit_json(d / "config.json", tie_word_embeddings=True), "tie_word_embeddings is true"),
    ("model", lambda d: edit_json(d / "config.json", hidden_act="gelu"), "hidden_act='gelu'"),
    ("model", lambda d: edit_json(d / "config.json", max_position_embeddings="x"), "it must be a number"),
    ("model", lambda d: edit_json(d / "config.json", vocab_size="x"), "vocab_size as whole numbers"),
    ("model", lambda d: edit_json(d / "config.json", hidden_size="48"), "hidden_size as whole numbers"),
    ("model", lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "fp8"}), "quantised"),
    ("tensor shapes", lambda d: edit_json(d / "config.json", num_key_value_heads=4), "is [32, 48], not [64, 48]"),
    ("tensor names", lambda d: edit_json(d / "config.json", num_hidden_layers=5), "9 missing"),
    ("generation config", lambda d: (d / "generation_config.json").write_text("[]"), "not a JSON object"),
    ("tokenizer", lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    ("tokenizer", lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    ("tokenizer", lambda d: edit_json(d / "config.json", vocab_size=300), "only 300"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=200), "ordinary entry"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=4000), "no token with id 4000"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=11), "token 11 is eos_token_id 11 as well"),
    ("bos and eos", lambda d: edit_json(d / "generation_config.json", eos_token_id=[11, 9999]), "no eos_token_id 9999"),
    ("chat template", lambda d: (d / "chat_template.jinja").write_text("{{ nothing.at.all }}"), "does not render"),
    ("chat template", lambda d: (d / "chat_template.jinja").write_text("hello"), "leaves out what was said"),
    ("code is complete", lambda d: (d / MODELING).unlink(), f"missing, though auto_map needs it: {MODELING}"),
    (
        "code is complete",
        lambda d: (d / "cache_nemotron_labs_diffusion.py").unlink(),
        "missing, though auto_map needs it: cache_nemotron_labs_diffusion.py",
    ),
    ("code is complete", lambda d: (d / MODELING).write_text("def broken(:"), f"{MODELING} is no Python"),
    ("code is complete", lambda d: (d / MODELING).write_text("import torch"), "classes that are not there"),
    ("code is complete", lambda d: edit_json(d / "config.json", "auto_map"), "no auto_map"),
    (
        "code is complete",
        lambda d: edit_json(d / "config.json", auto_map={"AutoConfig": "them/it--a.B", "AutoModel": "c.D"}),
        "auto_map takes AutoConfig from elsewhere (them/it--a.B)",
    ),
    ("other files", lambda d: (d / "pytorch_model.bin").touch(), "can run code when loaded: pytorch_model.bin"),
]


@pytest.mark.parametrize(("name", "damage", "detail"), DEFECTS)
def test_a_defect_fails_its_check(export: Path, name: str, damage: Callable[[Path], object], detail: str) -> None:
    damage(export)
    assert_found(export, name, Outcome.failed, detail)


@pytest.mark.parametrize(("name", "target"), [("linked", "."), ("README.md", "nowhere")])
def test_links_that_sums_cannot_follow_are_refused(export: Path, name: str, target: str) -> None:
    (export / name).symlink_to(export.parent / target)
    check = find(verify_export(export), "other files")
    assert (check.outcome, check.detail) == (Outcome.failed, f"link to a folder, or to nothing: {name}")


SURPRISES: list[tuple[str, Callable[[Path], object], str]] = [
    ("code is known", lambda d: (d / MODELING).open("a").write("# more\n"), f"changed: {MODELING}"),
    ("code is known", lambda d: (d / "chat_utils.py").touch(), "known; foreign: chat_utils.py"),
    ("other files", lambda d: (d / "notes.txt").touch(), "notes.txt"),
    (
        "config keys",
        lambda d: edit_json(d / "config.json", "dlm_paradigm", "torch_dtype"),
        "lacks dlm_paradigm, torch_d",
    ),
    ("config keys", lambda d: edit_json(d / "config.json", pad_token_id=11), "pad_token_id is 11"),
    (
        "positions",
        lambda d: edit_json(d / "config.json", max_position_embeddings=4096),
        "is not max_position_embeddings",
    ),
    ("generation config", lambda d: (d / "generation_config.json").unlink(), "there is no generation_config.json"),
    (
        "generation config",
        lambda d: edit_json(d / "generation_config.json", eos_token_id=2),
        "[2], in config.json [11]",
    ),
    ("chat template", lambda d: edit_json(d / "generation_config.json", eos_token_id=2), "([2]) follows an answer"),
    ("tensor formats", lambda d: edit_json(d / "config.json", torch_dtype="float32"), "config.json says float32"),
    (
        "tensor formats",
        lambda d: edit_tensors(d / WEIGHTS, lambda t: t.update({UP: t[UP].float()})),
        "38 in BF16, 1 in F32",
    ),
    (
        "tokenizer code",
        lambda d: edit_json(d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
        "a.B",
    ),
]


@pytest.mark.parametrize(("name", "change", "detail"), SURPRISES)
def test_what_may_be_right_is_a_warning(export: Path, name: str, change: Callable[[Path], object], detail: str) -> None:
    change(export)
    assert_found(export, name, Outcome.warned, detail)


def test_a_changed_weight_is_seen_by_its_sum_alone(export: Path) -> None:
    flip_byte(export / WEIGHTS, -1)
    found = verify_export(export)
    wrong = {check.name: check.detail for check in found.checks if check.outcome is not Outcome.passed}
    assert wrong == {"checksums": "changed: model.safetensors"}
    (export / SUMS_NAME).write_text("nonsense")
    assert find(verify_export(export), "checksums").detail == "damaged: SHA256SUMS"


def test_missing_and_added_files_are_named(export: Path) -> None:
    (export / "README.md").write_text("mine")
    (export / "chat_template.jinja").unlink()
    check = find(verify_export(export), "checksums")
    assert check.detail == "missing: chat_template.jinja; not listed: README.md"


def test_shards_and_index_must_agree(shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("model-*.safetensors"))
    index, first, second = shards / "model.safetensors.index.json", *(load_file(shards / name) for name in names[:2])
    save_file(first | second, shards / names[0], metadata={"format": "pt"})
    assert "in several shards: encoder" in find(verify_export(shards), "weight files").detail
    save_file(first, shards / names[0], metadata={"format": "pt"})
    edit_json(index, metadata={"total_size": 7})
    assert "total_size 7" in find(verify_export(shards), "weight files").detail
    save_file(first, shards / "model.safetensors", metadata={"format": "pt"})
    assert "both there" in find(verify_export(shards), "weight files").detail
    (shards / "model.safetensors").unlink()
    (shards / names[1]).unlink()
    check = find(verify_export(shards), "weight files")
    assert check.outcome is Outcome.failed and f"lacks {names[1]}" in check.detail


def test_what_git_and_the_hub_put_beside_an_export_is_not_part_of_it(export: Path) -> None:
    for name in (".git/HEAD", ".cache/huggingface/download/config.json.metadata"):
        (export / name).parent.mkdir(parents=True)
        (export / name).touch()
    assert not verify_export(export).has_failed
    assert find(verify_export(export), "checksums").outcome is Outcome.passed


def test_files_of_the_hubs_cache_are_links_to_files(export: Path) -> None:
    blob = export.parent / "blob"
    (export / WEIGHTS).rename(blob)
    (export / WEIGHTS).symlink_to(blob)
    assert {check.outcome for check in verify_export(export).checks} == {Outcome.passed}


def test_code_in_the_directory_is_never_executed(export: Path) -> None:
    for path in [*export.glob("*.py"), export / "custom_generate" / "generate.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('executed')\n")
    (export / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    found = verify_export(export)
    assert "0 known" in find(found, "code is known").detail
    assert find(found, "chat template").detail.startswith("it does not render")


def test_missing_sums_are_recorded_when_nothing_fails(export: Path) -> None:
    (export / SUMS_NAME).unlink()
    assert find(verify_export(export), "checksums").outcome is Outcome.warned
    edit_json(export / "config.json", mask_token_id=200)
    assert verify_export(export, record_sums=True).has_failed and not (export / SUMS_NAME).exists()
    edit_json(export / "config.json", mask_token_id=100)
    found = verify_export(export, record_sums=True)
    assert find(found, "checksums").outcome is Outcome.passed
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_NAME], cwd=export, check=True, capture_output=True)
    assert SUMS_NAME in found.sums
    (export / "README.md").touch()
    assert verify_export(export, record_sums=True).has_failed  # sums that are there are never replaced


def test_values_need_not_be_read(export: Path) -> None:
    edit_tensors(export / WEIGHTS, set_nan)
    assert find(verify_export(export, read_values=False), "values").outcome is Outcome.skipped


def test_what_is_no_export_is_refused(export: Path, written: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds neither config\.json nor"):
        verify_export(tmp_path / "empty")
    with pytest.raises(UserError, match="is not a directory"):
        verify_export(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a run: export it first"):
        verify_export(written / "run")
    with pytest.raises(UserError, match="no tri-mode checkpoint: model_type is 'mistral3'"):
        verify_export(written / "hf")


def put_adapter(export: Path, adapter: Path) -> Path:
    return Path(shutil.copytree(adapter, export / "linear_spec_lora"))


def test_an_adapter_put_into_an_export_answers_for_itself(export: Path, adapter: Path) -> None:
    folder = put_adapter(export, adapter)
    found = verify_export(export)
    assert {check.outcome for check in found.checks} == {Outcome.passed}, outcomes(found)
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
    assert find(verify_export(export), "checksums").outcome is Outcome.warned
    assert find(verify_export(export, record_sums=True), "checksums").outcome is Outcome.passed
    assert (export / SUMS_NAME).read_text() == before and (folder / SUMS_NAME).is_file()


def test_an_adapter_cannot_overrule_the_sums_of_the_export(export: Path, adapter: Path) -> None:
    folder = put_adapter(export, adapter)
    write_sums(export)  # all of it, the adapter included
    assert find(verify_export(export), "checksums").outcome is Outcome.passed
    edit_json(folder / "drafter.json", step=2)
    write_sums(folder)
    detail = find(verify_export(export), "checksums").detail
    assert detail == f"changed: linear_spec_lora/{SUMS_NAME}, linear_spec_lora/drafter.json"


def test_a_folder_that_is_no_adapter_cannot_answer_for_itself(export: Path) -> None:
    (export / "more").mkdir()
    (export / "more" / "code.py").touch()
    write_sums(export / "more")
    assert "not listed: more/SHA256SUMS, more/code.py" in find(verify_export(export), "checksums").detail


ADAPTER_DEFECTS: list[tuple[Callable[[Path], object], Outcome, str]] = [
    (lambda d: edit_json(d / "adapter_config.json", r=8), Outcome.failed, "says rank 8"),
    (lambda d: edit_json(d / "adapter_config.json", target_modules=["q_proj"]), Outcome.failed, "no drafter"),
    (lambda d: edit_json(d / "adapter_config.json", target_modules=3), Outcome.failed, "it changes 3"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), Outcome.failed, "has no adapter_model.safetensors"),
    (
        lambda d: edit_tensors(d / "adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])),
        Outcome.failed,
        "has no tensor",
    ),
    (
        lambda d: edit_tensors(
            d / "adapter_model.safetensors", lambda t: t.update({n: w.bfloat16() for n, w in list(t.items())})
        ),
        Outcome.warned,
        "its weights are BF16",
    ),
    (lambda d: d.rename(d.with_name("mine")), Outcome.warned, "decoding looks in linear_spec_lora/"),
    (lambda d: (d / "adapter_config.json").unlink(), Outcome.failed, "holds no adapter"),
]


@pytest.mark.parametrize(("damage", "outcome", "detail"), ADAPTER_DEFECTS)
def test_a_wrong_adapter_is_noticed(
    export: Path, adapter: Path, damage: Callable[[Path], object], outcome: Outcome, detail: str
) -> None:
    damage(put_adapter(export, adapter))
    found = verify_export(export)
    check = next(check for check in found.checks if check.name.startswith("adapter"))
    assert check.outcome is outcome and detail in check.detail, outcomes(found)


def test_infinite_values_of_an_adapter_are_noticed(export: Path, adapter: Path) -> None:
    path = put_adapter(export, adapter) / "adapter_model.safetensors"
    edit_tensors(path, lambda tensors: tensors[sorted(tensors)[0]].fill_(float("inf")))
    assert "not finite: base_model" in find(verify_export(export), "values").detail
