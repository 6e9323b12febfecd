"""A checkpoint without all of its tensors is refused by AutoModel too, not completed with random numbers."""

from pathlib import Path

import pytest
from transformers import AutoModel

from tests.helpers.edit_exports import edit_tensors
from tests.helpers.tiny_exports import make_tiny_model, save_tiny_export

UP = "encoder.layers.1.mlp.up_proj.weight"


def test_auto_model_refuses_a_checkpoint_without_a_tensor(tmp_path: Path) -> None:
    export = save_tiny_export(tmp_path / "export_without_a_tensor")
    edit_tensors(export / "model.safetensors", lambda tensors: tensors.pop(UP))
    with pytest.raises(ValueError, match=rf"the weights in .* lack 1 of the model's tensors, such as {UP}: download"):
        AutoModel.from_pretrained(export, trust_remote_code=True)


def test_loading_gives_what_it_was_asked_for(tmp_path: Path) -> None:
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "whole")
    assert type(type(model).from_pretrained(tmp_path / "whole")) is type(model)
    loaded, info = type(model).from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(loaded) is type(model) and not info["missing_keys"]
