"""Adapters that were trained elsewhere compute what PEFT computes, or are refused with the reason."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from conf.system.errors import UserError
from model.export.adapter_weights import find_stored_names, name_tensor
from model.export.load import attach_adapter, load_export
from model.hf.layers import DraftAdapter
from model.hf.speculation import measure_adapter_effect
from tests.helpers.edit_exports import edit_json, edit_tensors
from tests.helpers.tiny_exports import make_tiny_model, save_random_adapter, save_tiny_export

PROBE = torch.randint(101, 380, (4, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_export(tmp_path_factory.mktemp("adapters") / "export", chat_template=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random adapter as PEFT does. Do not change it."""
    return save_random_adapter(tmp_path_factory.mktemp("adapters") / "adapter")


def copy(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copy"))


def save_lora(folder: Path, **options: Any) -> Path:
    """Save a random LoRA with other options of PEFT's than a drafter's."""
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["o_proj"], **options}
    wrapped = get_peft_model(make_tiny_model(), LoraConfig(**config))  # pyright: ignore[reportArgumentType]
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    wrapped.save_pretrained(str(folder))
    return folder


def compute_as_peft(export: Path, folder: Path) -> Tensor:
    loaded = PeftModel.from_pretrained(load_export(export, device="cpu"), str(folder))
    return loaded(input_ids=PROBE).logits


def compute_as_we(export: Path, folder: Path) -> Tensor:
    model = load_export(export, device="cpu")
    attach_adapter(model, folder)
    return model(PROBE).logits


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    """Rename all tensors of an adapter."""

    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {new_name(name): tensors.pop(name) for name in list(tensors)}
        tensors.update(renamed)

    edit_tensors(folder / WEIGHTS, edit)
    return folder


def edited(adapter: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    copied = copy(adapter, folder)
    edit_tensors(copied / WEIGHTS, edit)
    return copied


RENAMED: dict[str, Callable[[str], str]] = {
    "no prefix of PEFT's": lambda name: name.removeprefix("base_model.model."),
    "half of it": lambda name: name.removeprefix("base_model."),
    "a wrapper around it": lambda name: f"module.{name}",
    "a compiled model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "a Ministral's names": lambda name: name.replace("encoder.", "model."),
}


@pytest.mark.parametrize("new_name", RENAMED.values(), ids=RENAMED)
def test_tensors_of_other_names_load_as_if_they_had_pefts(
    export: Path, adapter: Path, tmp_path: Path, new_name: Callable[[str], str]
) -> None:
    folder = rename(copy(adapter, tmp_path), new_name)
    names = {name_tensor(layer, side) for layer in range(NUM_LAYERS) for side in "AB"}
    assert find_stored_names(folder).keys() == names
    assert set(find_stored_names(folder).values()).isdisjoint(names)
    torch.testing.assert_close(compute_as_we(export, folder), compute_as_peft(export, adapter))


VARIANTS: dict[str, dict[str, Any]] = {
    "alpha below rank": {"lora_alpha": 1},
    "alpha with a fraction": {"lora_alpha": 2.5},
    "rank-stabilised": {"use_rslora": True},
    "a rank and an alpha for one layer": {
        "rank_pattern": {"layers.1.self_attn.o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.o_proj": 40},
    },
    "a pattern and rank-stabilised": {"rank_pattern": {r"layers\.0\..*o_proj": 8}, "use_rslora": True},
    "targets by their whole names": {"target_modules": [f"encoder.layers.{n}.self_attn.o_proj" for n in range(2)]},
    "targets by an expression": {"target_modules": r".*\.self_attn\.o_proj"},
    "dropout, which applies to training alone": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_other_ranks_and_scales_are_those_of_peft(export: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_lora(tmp_path / "adapter", **options)
    ours, pefts = compute_as_we(export, folder), compute_as_peft(export, folder)
    torch.testing.assert_close(ours, pefts)
    assert not torch.allclose(ours, load_export(export, device="cpu")(PROBE).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats_are_computed_in_fp32_as_peft_does(
    export: Path, adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = edited(adapter, tmp_path, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    torch.testing.assert_close(compute_as_we(export, folder), compute_as_peft(export, folder))


def zero(side: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if f"lora_{side}" in name]


def add_second(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace(".weight", ".second.weight")] = tensors[name].clone()


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "untrained": (zero("B"), "changes nothing: in every layer lora_A or lora_B is zero, as before training"),
    "no way in": (zero("A"), "changes nothing"),
    "infinite": (lambda tensors: next(iter(tensors.values())).fill_(torch.inf), "lora_A.weight is not finite"),
    "two adapters": (add_second, "are the same tensor of two adapters"),
    "keys of no module": (
        lambda tensors: [tensors.update({f"vision_tower.{n}": tensors.pop(n)}) for n in list(tensors)],
        "has no tensor base_model.model.encoder.layers.0",
    ),
    "another projection's": (
        lambda tensors: [tensors.update({n.replace("o_proj", "q_proj"): tensors.pop(n)}) for n in list(tensors)],
        "has no tensor",
    ),
}


@pytest.mark.parametrize(("edit", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_weights_that_change_nothing_or_cannot_be_used_are_refused(
    export: Path, adapter: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        compute_as_we(export, edited(adapter, tmp_path, edit))


def test_weights_that_are_zero_in_one_layer_do_something(export: Path, adapter: Path, tmp_path: Path) -> None:
    folder = edited(adapter, tmp_path, lambda tensors: tensors[name_tensor(0, "B")].zero_())
    torch.testing.assert_close(compute_as_we(export, folder), compute_as_peft(export, folder))


CONFIGURED: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"lora_alpha": 0}, "changes nothing: .* r 4 and lora_alpha 0, so that its update is scaled by 0"),
    "scale is no number": ({"lora_alpha": "much"}, "has no scale: .* lora_alpha much"),
    "rank zero": ({"r": 0}, "has no scale: .* r 0"),
    "weights of the model in it": ({"init_lora_weights": "pissa_niter_4"}, "the verifier would not be the checkpoint"),
}


@pytest.mark.parametrize(("changes", "reason"), CONFIGURED.values(), ids=CONFIGURED)
def test_a_configuration_that_changes_nothing_or_too_much_is_refused(
    export: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = copy(adapter, tmp_path)
    edit_json(folder / CONFIG, **changes)
    with pytest.raises(UserError, match=reason):
        compute_as_we(export, folder)


def test_another_scale_than_that_of_training_is_refused(export: Path, adapter: Path, tmp_path: Path) -> None:
    folder = copy(adapter, tmp_path)
    (folder / "drafter.json").write_text('{"rank": 4, "alpha": 16.0}')
    compute_as_we(export, folder)
    edit_json(folder / CONFIG, use_rslora=True)
    with pytest.raises(UserError, match=r"was trained with rank 4 and alpha 16, but .* and use_rslora"):
        compute_as_we(export, folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "unknown tensor .*magnitude_vector"),
        ({"lora_bias": True}, "unknown tensor .*lora_B.bias"),
        ({"modules_to_save": ["diffusion_head"]}, "unknown tensor .*diffusion_head"),
        ({"layers_to_transform": [1]}, "has 1 layers, the checkpoint 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_more_or_less_than_a_lora_on_every_o_proj_is_refused(
    export: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        compute_as_we(export, save_lora(tmp_path / "adapter", **options))


def test_a_pickle_is_not_read(export: Path, adapter: Path, tmp_path: Path) -> None:
    folder = copy(adapter, tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors: save adapter_model\.bin as safetensors"):
        compute_as_we(export, folder)


def test_loading_logs_by_how_much_a_draft_changes(
    export: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    effects = []
    for factor in (1e-3, 1.0):
        folder = Path(shutil.copytree(adapter, tmp_path / str(factor)))
        edit_tensors(folder / WEIGHTS, lambda tensors: [tensor.mul_(factor) for tensor in tensors.values()])  # noqa: B023
        model = load_export(export, device="cpu")
        with caplog.at_level(logging.INFO, logger="model.export.load"):
            attach_adapter(model, folder)
        effects.append(measure_adapter_effect(model))
        assert caplog.messages[-1] == f"the draft adapter {folder} {effects[-1]}"
    weak, strong = effects
    assert 0 < weak.mean < 1e-3 < 0.1 < strong.mean < strong.largest
    assert weak.changed == 0 < strong.changed <= strong.drafted == 7
    # Measured as drafting computes it: both restate one another.
    before, after = model(PROBE).logits, compute_as_peft(export, adapter)
    torch.testing.assert_close(before, after)
    assert DraftAdapter(model)


def test_transformers_own_loader_refuses_an_adapter_without_effect(export: Path, adapter: Path, tmp_path: Path) -> None:
    folder = copy(adapter, tmp_path)
    edit_json(folder / CONFIG, lora_alpha=0)
    with pytest.raises(ValueError, match="changes nothing: a draft has the same logits without it"):
        load_export(export, device="cpu").load_adapter(str(folder))
    load_export(export, device="cpu").load_adapter(str(adapter))
