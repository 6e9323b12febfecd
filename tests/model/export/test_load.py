"""An export and its draft adapter are loaded with our classes, or refused in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from conf.system.errors import UserError
from model.export.load import attach_adapter, check_vocabulary, find_stop_ids, load_export, load_export_tokenizer
from model.hf.decoding import decode_ar
from model.hf.layers import find_draft_adapters
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from model.hf.options import DecodeOptions
from model.hf.speculation import real_context_acceptance
from tests.helpers.tiny_checkpoints import make_ministral3_vlm
from tests.helpers.tiny_exports import make_tiny_model, save_random_adapter, save_tiny_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the export of a base model, which has no chat template."""
    return save_tiny_export(tmp_path_factory.mktemp("load") / "export", chat_template=False)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, old: str, new: str | None) -> None:
    """Rename a tensor of an adapter, or leave it out."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    moved = weights.pop(old)
    save_file(weights | ({new: moved} if new else {}), path)


def test_the_model_is_the_one_saved(export: Path) -> None:
    model = load_export(export, device="cpu")
    assert type(model) is NemotronLabsDiffusionModel
    assert (model.dtype, model.training, find_stop_ids(model)) == (torch.float32, False, (11,))
    assert not find_draft_adapters(model)[1]
    prompt = torch.tensor([[5, 120, 130]])
    torch.testing.assert_close(model(prompt).logits, make_tiny_model()(prompt).logits)
    assert load_export(export, device="cpu", dtype="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_attention_kernel_of_others_is_fetched(export: Path, tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    edit_json(folder / "config.json", **{key: "kernels-community/flash-attn2"})
    assert load_export(folder, device="cpu").config._attn_implementation == "sdpa"


def test_what_transformers_cannot_build_is_one_message(export: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    edit_json(folder / "generation_config.json", watermarking_config=3)
    with pytest.raises(UserError, match="cannot be read"):
        load_export(folder, device="cpu")


def test_a_base_model_needs_no_chat_template(export: Path) -> None:
    tokenizer = load_export_tokenizer(export)
    check_vocabulary(export, tokenizer, len(tokenizer))
    with pytest.raises(UserError, match="it belongs to another model"):
        check_vocabulary(export, tokenizer, len(tokenizer) - 1)


def test_a_start_checkpoint_is_no_tri_mode_checkpoint(tmp_path: Path) -> None:
    make_ministral3_vlm(tmp_path, spelling="text")
    with pytest.raises(UserError, match=r"is not a tri-mode checkpoint: config\.json has model_type 'ministral3'"):
        load_export(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_attached_adapter_computes_what_peft_computes(export: Path, tmp_path: Path, dtype: str) -> None:
    folder = save_random_adapter(tmp_path / "adapter")
    model = load_export(export, device="cpu", dtype=dtype)
    attach_adapter(model, folder)
    assert len(find_draft_adapters(model)[1]) == 2
    reference = PeftModel.from_pretrained(load_export(export, device="cpu", dtype=dtype), str(folder))
    prefixes = torch.randint(101, 380, (30, 6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(prefixes).logits, reference(input_ids=prefixes).logits)
    assert not torch.equal(model(prefixes).logits, load_export(export, device="cpu", dtype=dtype)(prefixes).logits)
    expected = real_context_acceptance(reference, prefixes, 8)
    assert torch.equal(real_context_acceptance(model, prefixes, 8), expected)


def test_ar_is_the_same_with_an_adapter_attached(export: Path, tmp_path: Path) -> None:
    options = DecodeOptions(max_new_tokens=20, eos_token_id=[])
    model, prompt = load_export(export, device="cpu"), torch.tensor([[5, 120, 130]])
    before = decode_ar(model, prompt, options).output_ids
    attach_adapter(model, save_random_adapter(tmp_path / "adapter"))
    assert torch.equal(decode_ar(model, prompt, options).output_ids, before)


def test_an_adapter_of_another_checkpoint_is_refused(export: Path, tmp_path: Path) -> None:
    model = load_export(export, device="cpu")
    wider = save_random_adapter(tmp_path / "wider", hidden_size=32)
    with pytest.raises(UserError, match=r"made for another checkpoint: .*lora_B\.weight is \[32, 4\], .* \[24, 4\]"):
        attach_adapter(model, wider)
    heads = save_random_adapter(tmp_path / "heads", head_dim=8)
    with pytest.raises(UserError, match=r"made for another checkpoint: .*lora_A\.weight is \[4, 32\], .* \[4, 64\]"):
        attach_adapter(model, heads)
    for layers in (1, 3):
        deeper = save_random_adapter(tmp_path / f"layers{layers}", num_hidden_layers=layers)
        with pytest.raises(
            UserError, match=f"has {layers} layers, the checkpoint 2: it was made for another checkpoint"
        ):
            attach_adapter(model, deeper)
    assert not find_draft_adapters(model)[1]


def test_an_adapter_whose_rank_is_not_the_one_it_says_is_refused(export: Path, tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "adapter", rank=4)
    edit_json(folder / "adapter_config.json", r=8)
    with pytest.raises(UserError, match=r"adapter_config\.json says rank 8, but .* has rank 4"):
        attach_adapter(load_export(export, device="cpu"), folder)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "o_proj")])
def test_an_adapter_of_other_projections_is_no_drafter(export: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    folder = save_random_adapter(tmp_path / "adapter", targets=targets)
    with pytest.raises(UserError, match=rf"not a drafter: it changes {', '.join(sorted(targets))}"):
        attach_adapter(load_export(export, device="cpu"), folder)


def test_a_damaged_adapter_is_refused(export: Path, tmp_path: Path) -> None:
    model = load_export(export, device="cpu")
    with pytest.raises(UserError, match=r"no draft adapter in .*: give the folder that holds adapter_config\.json"):
        attach_adapter(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a PEFT adapter: it has no adapter_config\.json"):
        attach_adapter(model, export)
    whole = save_random_adapter(tmp_path / "adapter")
    a = "base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight"
    folders = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("missing", "renamed", "cut", "none", "ia3")]
    edit_weights(folders[0], a, None)
    edit_weights(folders[1], a, a.replace("lora_A", "lora_magnitude_vector"))
    (folders[2] / "adapter_model.safetensors").write_bytes(b"12345678")
    (folders[3] / "adapter_model.safetensors").unlink()
    edit_json(folders[4] / "adapter_config.json", peft_type="IA3")
    problems = (
        "has no tensor",
        "not plain LoRA",
        "is damaged",
        r"has no adapter_model\.safetensors",
        "peft_type 'IA3'",
    )
    for folder, problem in zip(folders, problems, strict=True):
        with pytest.raises(UserError, match=problem):
            attach_adapter(model, folder)
    attach_adapter(model, whole)
    with pytest.raises(UserError, match="cannot be used: Adapter with name default already exists"):
        attach_adapter(model, whole)
