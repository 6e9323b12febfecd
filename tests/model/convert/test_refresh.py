"""A refresh brings an export of an earlier version up to date and touches no weight."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model_state_dict

from conf.schema.drafter import AdapterConfig
from conf.system.errors import UserError
from lora.drafter.adapter import attach_new_adapter, save_adapter
from model.checkpoint.checksums import find_damage, write_sums
from model.convert.__main__ import main
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.hf_target import format_json
from model.convert.progress import Progress
from model.convert.refresh import Refreshed, refresh_export
from model.export import draft_adapter
from model.export.draft_adapter import check_trained_for, identify_checkpoint, is_checkpoint
from model.export.load import load_export
from model.export.shipped_code import list_code_files
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, flip_byte
from tests.helpers.export_checks import find
from tests.helpers.tiny_checkpoints import MASK_TOKEN, make_ministral3_vlm
from tests.model.hf.adapters import fill_adapter

OLD_CODE = {
    "modeling_nemotron_labs_diffusion.py": "from .adapter_nemotron_labs_diffusion import x\n\n\n"
    "class NemotronLabsDiffusionModel: ...\n",
    "adapter_nemotron_labs_diffusion.py": "x = 1\n",
}
DENOISING_KEYS = ("max_denoising_steps", "diffusion_selection_policy", "diffusion_confidence_threshold")
SHIPPED = {path.name for path in list_code_files()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a model. Do not change it."""
    folder = tmp_path_factory.mktemp("refresh")
    make_ministral3_vlm(folder / "hf")
    import_checkpoint(folder / "hf", folder / "run", MASK_TOKEN, Progress())
    export_checkpoint(folder / "run", folder / "export", Progress(), max_shard_bytes=10**9)
    return folder / "export"


@pytest.fixture
def old(exported: Path, tmp_path: Path) -> Path:
    """Make an export of an earlier version: other code files, another tokenizer class, fewer keys."""
    directory = Path(shutil.copytree(exported, tmp_path / "old"))
    for name in SHIPPED - {"configuration_nemotron_labs_diffusion.py"}:
        (directory / name).unlink()
    for name, text in OLD_CODE.items():
        (directory / name).write_text(text)
    (directory / "own_notes.py").write_text("# of its owner\n")
    config = json.loads((directory / "config.json").read_text())
    for key in ("transformers_version", "sliding_window", "pad_token_id"):
        del config[key]
    edit_json(directory / "generation_config.json", *DENOISING_KEYS)
    (directory / "config.json").write_text(format_json(config))
    extra = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<think>"]}
    edit_json(directory / "tokenizer_config.json", **extra)
    write_sums(directory)
    return directory


def read(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_code_and_configuration_become_those_of_an_export_of_today(old: Path, exported: Path) -> None:
    weights = os.stat(old / "model.safetensors")
    changed = refresh_export(old)
    assert changed.removed == ["adapter_nemotron_labs_diffusion.py"]
    found, expected = read(old), read(exported)
    assert found.pop("own_notes.py") and found.keys() == expected.keys()
    tokenizer = json.loads(found.pop("tokenizer_config.json"))
    assert tokenizer == json.loads(expected.pop("tokenizer_config.json")) | {"additional_special_tokens": ["<think>"]}
    assert {name for name, content in found.items() if content != expected[name]} == {"SHA256SUMS"}
    after = os.stat(old / "model.safetensors")
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    assert find_damage(old) is None
    assert list(old.parent.iterdir()) == [old]


def test_a_second_refresh_finds_nothing_to_do(old: Path) -> None:
    refresh_export(old)
    before = os.stat(old).st_ino
    assert refresh_export(old) == Refreshed([], [])
    assert os.stat(old).st_ino == before


@pytest.mark.parametrize("is_listed", [False, True], ids=["own sums", "listed in the export's"])
def test_its_draft_adapter_still_belongs_to_it(old: Path, is_listed: bool) -> None:
    folder = old / "linear_spec_lora"
    model = attach_new_adapter(load_export(old, device="cpu"), AdapterConfig(rank=4, alpha=16.0), seed=0)
    fill_adapter(model, "default", std=0.3)
    save_adapter(model, get_peft_model_state_dict(model), folder, {"checkpoint": identify_checkpoint(old)})
    if is_listed:
        (folder / "SHA256SUMS").unlink()
        write_sums(old)
    before = read(folder)
    refresh_export(old)
    assert read(folder) == before
    check_trained_for(folder, old)
    assert not verify_export(old).has_failed


def test_an_identity_that_an_earlier_version_computed_is_still_accepted(exported: Path) -> None:
    assert is_checkpoint(exported, identify_checkpoint(exported))
    assert is_checkpoint(exported, draft_adapter._identify(exported, (exported / "config.json").read_bytes()))
    assert not is_checkpoint(exported, "another")


def test_an_identity_outlives_what_a_refresh_adds(old: Path) -> None:
    config = (old / "config.json").read_bytes()
    before = [identify_checkpoint(old), draft_adapter._identify(old, config)]
    assert "config.json" in refresh_export(old).written and (old / "config.json").read_bytes() != config
    assert all(is_checkpoint(old, identity) for identity in before)
    edit_json(old / "config.json", sliding_window=4096)
    assert not any(is_checkpoint(old, identity) for identity in before)


def test_values_of_its_generation_config_stay(old: Path) -> None:
    edit_json(old / "generation_config.json", diffusion_confidence_threshold=0.8, top_k=5, eos_token_id=[2, 11])
    write_sums(old)
    refresh_export(old)
    assert json.loads((old / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 11],
        "top_k": 5,
        "diffusion_confidence_threshold": 0.8,
        "diffusion_selection_policy": "confidence_threshold",
        "max_denoising_steps": 32,
    }
    (old / "generation_config.json").write_text("{")
    (old / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json is damaged"):
        refresh_export(old)


def test_an_export_that_another_program_has_written_anew_stays_its_own(old: Path) -> None:
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config, indent=4))
    write_sums(old)
    before = identify_checkpoint(old)
    assert "config.json" not in refresh_export(old).written
    assert identify_checkpoint(old) == before


def test_a_link_to_an_export_stays_one(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latest").symlink_to("old")
    assert refresh_export(tmp_path / "latest").written
    assert (tmp_path / "latest").is_symlink() and refresh_export(old) == Refreshed([], [])
    monkeypatch.chdir(old)
    (old / "layers.py").write_text("# changed\n")
    (old / "SHA256SUMS").unlink()
    assert refresh_export(Path()).written == ["layers.py"]
    assert not (old / "SHA256SUMS").exists()


def test_two_refreshes_at_once_destroy_nothing(old: Path, exported: Path) -> None:
    command = [sys.executable, "-m", "model.convert", "--refresh", str(old)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert 0 in [process.returncode for process in processes]
    assert all("being refreshed by another process" in error for error in errors if "error:" in error), errors
    assert read(old).keys() - {"own_notes.py"} == read(exported).keys()
    assert find_damage(old) is None
    assert list(old.parent.iterdir()) == [old]


def test_verification_says_which_versions_load_it(old: Path, exported: Path) -> None:
    def describe() -> str:
        check = find(verify_export(old), "transformers")
        return f"{check.outcome}: {check.detail}"

    for found in ("names the class TokenizersBackend", "lists extra_special_tokens", "has no transformers_version"):
        assert describe().startswith("warn") and found in describe()
    for name in SHIPPED:
        shutil.copyfile(exported / name, old / name)
    modeling = (old / "modeling_nemotron_labs_diffusion.py").read_text()
    (old / "modeling_nemotron_labs_diffusion.py").write_text(modeling.replace("from .rope import", "from rope import"))
    assert "do not import rope.py themselves, which needs 5.11" in describe()
    refresh_export(Path(shutil.copytree(exported, old, dirs_exist_ok=True)))
    assert describe() == "pass: loads from this folder in 4.57 and newer"


def test_what_cannot_be_refreshed_is_left_as_it_is(old: Path, tmp_path: Path) -> None:
    def refuse(directory: Path, message: str) -> None:
        before = read(directory)
        with pytest.raises(UserError, match=message):
            refresh_export(directory)
        assert read(directory) == before

    refuse(tmp_path / "nowhere", "is not a directory")
    damaged = Path(shutil.copytree(old, tmp_path / "damaged"))
    flip_byte(damaged / "model.safetensors", 3000)
    refuse(damaged, "is damaged: model.safetensors")
    (damaged / "tokenizer.json").unlink()
    refuse(damaged, "is damaged: tokenizer.json is missing")
    foreign = Path(shutil.copytree(old, tmp_path / "foreign"))
    edit_json(foreign / "config.json", auto_map={"AutoModel": "modeling_other.Model"})
    refuse(foreign, "not an export of this project")
    adapter = damaged / "linear_spec_lora"
    shutil.rmtree(damaged)
    shutil.copytree(old, damaged)
    adapter.mkdir()
    (adapter / "drafter.json").write_text("{}")
    write_sums(adapter)
    (adapter / "drafter.json").write_text('{"step": 2}')
    refuse(damaged, "linear_spec_lora is damaged: drafter.json")
    (damaged / "SHA256SUMS").write_text("garbage")
    refuse(damaged, "SHA256SUMS is damaged")
    piped = Path(shutil.copytree(old, tmp_path / "piped"))
    os.mkfifo(piped / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        refresh_export(piped)
    latin = Path(shutil.copytree(old, tmp_path / "latin"))
    (latin / "SHA256SUMS").unlink()
    (latin / "adapter_nemotron_labs_diffusion.py").write_bytes(b"x = '\xe9'\n")
    refuse(latin, "is not Python")
    linked = Path(shutil.copytree(old, tmp_path / "linked"))
    (linked / "blob").symlink_to(old / "tokenizer.json")
    refuse(linked, "is a link")


def test_the_command_says_what_it_changed(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--refresh", str(old)]) == 0
    said = capsys.readouterr().out
    assert "wrote attention_mask.py, cache.py" in said and "removed adapter_nemotron_labs_diffusion.py;" in said
    assert "speculation.py, tokenizer_config.json;" in said
    assert main(["--refresh", str(old)]) == 0
    assert "nothing to refresh" in capsys.readouterr().out
    assert main(["--refresh", str(old), "--to", "elsewhere"]) == 2
    assert "--to has no effect beside --refresh" in capsys.readouterr().err
    assert main([]) == 2
    assert "give --from and --to, or --refresh" in capsys.readouterr().err
