"""A saved directory is complete: it loads with AutoModel in another process, without this repository."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from model.export.shipped_code import list_code_files

LOAD_AND_DECODE = """
import json, sys, torch
from transformers import AutoConfig, AutoModel
directory, out = sys.argv[1:]
model, info = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert model.dtype == torch.bfloat16 and not model.training, (model.dtype, model.training)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert "peft" not in sys.modules and "model.hf" not in sys.modules
exact = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
prompt = torch.tensor([[5, 9, 11, 40, 3]])
decodes = {name: getattr(exact, name)(prompt, max_new_tokens=20, eos_token_id=[])
           for name in ("ar_generate", "generate", "linear_spec_generate", "quadratic_spec_generate")}
bf16 = model.linear_spec_generate(prompt, max_new_tokens=20, eos_token_id=[])[0].shape
with torch.no_grad():
    logits = exact(torch.arange(3, 53)[None]).logits
exact.save_pretrained(out + ".again")
torch.save({"decodes": decodes, "bf16": bf16, "logits": logits, "module": type(model).__module__}, out)
"""


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Save a bf16 export and let another process load it; return its folder, the model and what that process got."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny.model(torch.bfloat16)
    model.save_pretrained(folder / "export")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD_AND_DECODE, str(folder / "export"), str(folder / "out.pt")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, model, torch.load(folder / "out.pt")


def test_another_process_computes_the_same(saved):
    _, model, results = saved
    assert results["module"].startswith("transformers_modules.")
    exact = model.float()
    with torch.no_grad():
        torch.testing.assert_close(results["logits"], exact(torch.arange(3, 53)[None]).logits)
    prompt = torch.tensor([[5, 9, 11, 40, 3]])
    for name, (output, num_forwards) in results["decodes"].items():
        expected, expected_forwards = getattr(exact, name)(prompt, max_new_tokens=20, eos_token_id=[])
        assert torch.equal(output, expected), name
        assert num_forwards == expected_forwards
    for name in ("linear_spec_generate", "quadratic_spec_generate"):
        assert torch.equal(results["decodes"]["ar_generate"][0], results["decodes"][name][0])
    assert results["bf16"] == (1, 25)


@pytest.mark.parametrize("directory", ["export", "out.pt.again"])
def test_a_saved_directory_holds_code_config_and_9_tensors_per_layer_plus_3(saved, directory):
    path = saved[0] / directory
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "nemotron_labs_diffusion"
    assert config["architectures"] == ["NemotronLabsDiffusionModel"]
    assert {name: value.split("--")[-1] for name, value in config["auto_map"].items()} == {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    }
    assert not config["tie_word_embeddings"]
    with safe_open(path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{side}_proj" for side in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    expected = {f"encoder.layers.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert names == expected | {"encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"}
    assert len(names) == 9 * 2 + 3
    assert {file.name: file.read_text() for file in path.glob("*.py")} == {
        file.name: file.read_text() for file in list_code_files()
    }
