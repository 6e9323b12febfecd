"""An export of ours passes every check, and each defect, put into one for real, fails the check that names it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.system.errors import UserError
from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, edit_tensors, flip_byte
from tests.helpers.export_checks import assert_found, find, outcomes

MODELING = "modeling_nemotron_labs_diffusion.py"
WEIGHTS = "model.safetensors"
UP = "encoder.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", ["export", "shards"])
def test_what_the_project_exports_passes_every_check(written: Path, kind: str) -> None:
    found = verify_export(written / kind)
    assert {check.outcome for check in found.checks} == {CheckOutcome.passed}, outcomes(found)
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
    (
        "denoising",
        lambda d: edit_json(d / "generation_config.json", diffusion_selection_policy="entropy"),
        "'entropy' is none of confidence_threshold, low_confidence, leftmost",
    ),
    ("denoising", lambda d: edit_json(d / "generation_config.json", max_denoising_steps=0), "steps 0 is no whole"),
    (
        "denoising",
        lambda d: edit_json(d / "generation_config.json", diffusion_confidence_threshold=0.0),
        "threshold 0.0 is no probability above 0",
    ),
    ("tokenizer", lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    ("tokenizer", lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer"),
    ("tokenizer", lambda d: edit_json(d / "config.json", vocab_size=300), "only 300"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=200), "ordinary entry"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=4000), "no token with id 4000"),
    ("mask token", lambda d: edit_json(d / "config.json", mask_token_id=11), "is eos_token_id of the tokenizer"),
    ("bos and eos", lambda d: edit_json(d / "generation_config.json", eos_token_id=[11, 9999]), "no eos_token_id 9999"),
    ("chat template", lambda d: (d / "chat_template.jinja").write_text("{{ nothing.at.all }}"), "does not render"),
    ("chat template", lambda d: (d / "chat_template.jinja").write_text("hello"), "leaves out what was said"),
    ("code is complete", lambda d: (d / MODELING).unlink(), f"missing, though auto_map needs it: {MODELING}"),
    (
        "code is complete",
        lambda d: (d / "cache.py").unlink(),
        "missing, though auto_map needs it: cache.py",
    ),
    ("code is complete", lambda d: (d / MODELING).write_text("def broken(:"), f"{MODELING} is not Python"),
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
    assert_found(export, name, CheckOutcome.failed, detail)


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
        "config keys",
        lambda d: edit_json(d / "config.json", "pad_token_id", "sliding_window"),
        "lacks sliding_window (null), pad_token_id (null)",
    ),
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
    ("denoising", lambda d: (d / "generation_config.json").unlink(), "lacks diffusion_selection_policy, max"),
    (
        "denoising",
        lambda d: edit_json(d / "generation_config.json", max_denoising_steps=16),
        "max_denoising_steps 16 is less than block_size 32",
    ),
    ("chat template", lambda d: edit_json(d / "generation_config.json", eos_token_id=2), "([2]) follows a response"),
    (
        "bos and eos",
        lambda d: (d / "special_tokens_map.json").write_text('{"eos_token": "</s>"}'),
        "transformers takes '</s>' (2) for the tokenizer's eos_token, tokenizer_config.json names token 11",
    ),
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
    assert_found(export, name, CheckOutcome.warned, detail)


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
    assert check.outcome is CheckOutcome.failed and f"lacks {names[1]}" in check.detail


def test_code_in_the_directory_is_never_executed(export: Path) -> None:
    for path in [*export.glob("*.py"), export / "custom_generate" / "generate.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('executed')\n")
    (export / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    found = verify_export(export)
    assert "0 known" in find(found, "code is known").detail
    assert find(found, "chat template").detail.startswith("it does not render")


def test_values_need_not_be_read(export: Path) -> None:
    edit_tensors(export / WEIGHTS, set_nan)
    assert find(verify_export(export, read_values=False), "values").outcome is CheckOutcome.skipped


def test_what_is_no_export_is_refused(export: Path, written: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds neither config\.json nor"):
        verify_export(tmp_path / "empty")
    with pytest.raises(UserError, match="is not a directory"):
        verify_export(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a run: export it first"):
        verify_export(written / "run")
    with pytest.raises(UserError, match="not a tri-mode checkpoint: model_type is 'mistral3'"):
        verify_export(written / "hf")
