"""A directory is loaded with our classes, or refused in one sentence."""

import json

import pytest
import torch

from conf.system.errors import UserError
from model.chat.chat_model import load_chat_model
from model.export.load import resolve_device
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_default_on_a_cpu_is_fp32(export):
    loaded = load_chat_model(export, device="cpu")
    assert type(loaded.model) is NemotronLabsDiffusionModel
    assert (loaded.model.dtype, loaded.model.training, loaded.stop_ids) == (torch.float32, False, (11,))
    assert not loaded.has_adapter
    assert load_chat_model(export, device="cpu", dtype="bf16").model.dtype == torch.bfloat16


def test_code_in_the_directory_is_not_executed(copy_export):
    shipped = list(copy_export.glob("*.py"))
    assert shipped
    assert "auto_map" in json.loads((copy_export / "config.json").read_text())
    for path in [*shipped, copy_export / "custom_generate" / "generate.py"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('executed')\n")
    assert load_chat_model(copy_export, device="cpu").model.config.block_size == 8


def test_eos_of_the_generation_config_comes_first_and_may_be_several(copy_export):
    edit_json(copy_export / "generation_config.json", eos_token_id=[2, 11])
    assert load_chat_model(copy_export, device="cpu").stop_ids == (2, 11)
    (copy_export / "generation_config.json").unlink()
    assert load_chat_model(copy_export, device="cpu").stop_ids == (11,)


def test_a_released_directory_without_code_files_loads(copy_export):
    for path in copy_export.glob("*.py"):
        path.unlink()
    load_chat_model(copy_export, device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "not an exported checkpoint: it has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("chat_template.jinja", "has no chat_template.jinja"),
    ],
)
def test_a_missing_file_is_named(copy_export, name, message):
    (copy_export / name).unlink()
    with pytest.raises(UserError, match=message):
        load_chat_model(copy_export)


def test_what_is_no_export_is_refused(copy_export, tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        load_chat_model(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a run: export it first, python -m model\.convert"):
        load_chat_model(tmp_path / "run")
    edit_json(copy_export / "config.json", model_type="mistral3")
    with pytest.raises(UserError, match="model_type 'mistral3', not 'nemotron_labs_diffusion'"):
        load_chat_model(copy_export)


def test_damaged_files_are_refused(copy_export):
    weights = copy_export / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_chat_model(copy_export)
    weights.write_bytes(whole)
    edit_json(copy_export / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lack 9 of the model's tensors, such as encoder\.layers\.2"):
        load_chat_model(copy_export)
    edit_json(copy_export / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"have unknown 9 of the model's tensors"):
        load_chat_model(copy_export)
    edit_json(copy_export / "config.json", num_hidden_layers=2, intermediate_size=44)
    with pytest.raises(UserError, match="cannot be read"):
        load_chat_model(copy_export)
    edit_json(copy_export / "config.json", intermediate_size=40, hidden_act="gelu")
    with pytest.raises(UserError, match="hidden_act is 'gelu'"):
        load_chat_model(copy_export)
    (copy_export / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be read"):
        load_chat_model(copy_export)


def test_a_device_that_is_not_there_is_named():
    assert resolve_device("cpu").type == "cpu"
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(UserError, match=f"there is no device '{device}' here"):
            resolve_device(device)


def test_the_draft_adapter_is_attached_unless_unwanted(copy_export, add_adapter):
    plain = load_chat_model(copy_export, device="cpu").model
    add_adapter(copy_export)
    loaded = load_chat_model(copy_export, device="cpu")
    assert loaded.has_adapter
    assert not load_chat_model(copy_export, device="cpu", use_adapter=False).has_adapter
    prompt, options = torch.tensor([[5, 120, 130]]), {"max_new_tokens": 24, "eos_token_id": []}
    assert not torch.allclose(loaded.model(prompt).logits, plain(prompt).logits)
    expected, _ = plain.ar_generate(prompt, **options)
    assert torch.equal(loaded.model.ar_generate(prompt, **options)[0], expected)
    assert torch.equal(loaded.model.linear_spec_generate(prompt, **options)[0], expected)


def test_an_adapter_that_does_not_fit_is_refused(copy_export, add_adapter):
    folder = add_adapter(copy_export, targets=("q_proj", "o_proj"))
    with pytest.raises(UserError, match=r"is not a drafter"):
        load_chat_model(copy_export)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="--no-adapter"):
        load_chat_model(copy_export)
