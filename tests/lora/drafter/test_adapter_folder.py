"""The adapter never takes the place of anything but what the same run put there."""

from pathlib import Path

import pytest
from peft import get_peft_model_state_dict

from conf.composition.compose import compose_drafter_config
from conf.schema.drafter import AdapterConfig, DrafterConfig
from conf.system.errors import UserError
from lora.drafter.adapter import attach_new_adapter, save_adapter
from lora.drafter.adapter_folder import check_output, draw_run_id, is_written, read_run_id
from tests.helpers.tiny_exports import make_tiny_model


def make_config(tmp_path: Path, run: str, output: Path | None = None) -> DrafterConfig:
    run_dir = tmp_path / run
    run_dir.mkdir(exist_ok=True)
    draw_run_id(run_dir)
    where = [] if output is None else [f"output={output}"]
    return compose_drafter_config([f"checkpoint={tmp_path}/export", "data=x", f"run.dir={run_dir}", *where])


def write(config: DrafterConfig, folder: Path, step: int = 3) -> None:
    model = attach_new_adapter(make_tiny_model(), AdapterConfig(rank=2, alpha=8.0), seed=0)
    record = {"run_id": read_run_id(Path(config.run.dir)), "step": step}
    save_adapter(model, get_peft_model_state_dict(model), folder, record)


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    first = read_run_id(Path(make_config(tmp_path, "a").run.dir))
    assert first == read_run_id(Path(make_config(tmp_path, "a").run.dir))
    assert first != read_run_id(Path(make_config(tmp_path, "b").run.dir))


def test_a_run_may_replace_its_own_adapter_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "export" / "linear_spec_lora"
    ours, theirs = make_config(tmp_path, "ours"), make_config(tmp_path, "theirs")
    check_output(ours)
    write(ours, folder)
    check_output(ours)
    assert is_written(ours, 3) and not is_written(ours, 4) and not is_written(theirs, 3)
    (folder / "SHA256SUMS").unlink()  # as adapters were written before there were sums
    check_output(ours)
    assert is_written(ours, 3)
    with pytest.raises(UserError, match="is left alone"):
        check_output(theirs)


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    config = make_config(tmp_path, "run", folder)
    write(config, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is left alone"):
        check_output(config)
    released = tmp_path / "released"
    released.mkdir()
    (released / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is left alone"):
        check_output(make_config(tmp_path, "run", released))


@pytest.mark.parametrize("name", ["file", "file/adapter"])
def test_what_can_be_no_folder_is_refused_before_anything_is_trained(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        check_output(make_config(tmp_path, "run", tmp_path / name))
