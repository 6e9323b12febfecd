"""Exports load in software that knows Ministral 3, and released checkpoints load, verify and convert here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Ministral3Config, Ministral3ForCausalLM, Mistral3ForConditionalGeneration

from conf.system.errors import UserError
from model.convert.checkpoint_info import read_checkpoint_info
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.progress import Progress
from model.export.load import find_stop_ids, load_export
from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json, edit_tensors
from tests.helpers.tiny_checkpoints import (
    MASK_TOKEN,
    VOCAB_SIZE,
    make_ministral3_vlm,
    tiny_model_config,
)

SHARD_BYTES = 60_000
UP = "encoder.layers.2.mlp.up_proj.weight"
TOKENS = torch.randint(101, VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(0))
# What a serving stack does to names of this format, which it then loads as Ministral 3.
TEXT = {"encoder.": "model.", "diffusion_head.": "lm_head."}
VISION = {"encoder.": "language_model.model.", "diffusion_head.": "language_model.lm_head."}
# Sizes of the two kinds of release at a 32nd: instruct (factor 16), base (0.25).
MODELS = {
    "instruct": tiny_model_config(max_position_embeddings=512),
    "base": tiny_model_config(factor=0.25, original_max_position_embeddings=512, max_position_embeddings=128),
}


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    """Return which release is tested."""
    return request.param


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write an export of each kind. Do not change them."""
    folder = tmp_path_factory.mktemp("interoperability")
    for kind, model in MODELS.items():
        make_ministral3_vlm(folder / f"{kind}-hf", model=model, tied=kind == "base", spelling="text")
        import_checkpoint(folder / f"{kind}-hf", folder / f"{kind}-run", MASK_TOKEN, Progress())
        export_checkpoint(folder / f"{kind}-run", folder / kind, Progress(), max_shard_bytes=10**9)
    return {kind: folder / kind for kind in MODELS}


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=TOKENS).logits


def rename(directory: Path, prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Return the export's tensors under other names; every name must begin with one of the prefixes."""
    tensors = load_file(directory / "model.safetensors")
    renamed = [(name, old, new) for name in tensors for old, new in prefixes.items() if name.startswith(old)]
    assert len(renamed) == len(tensors)
    return {new + name.removeprefix(old): tensors[name] for name, old, new in renamed}


def read_text_config(directory: Path) -> dict[str, Any]:
    """Read config.json as a serving stack takes it: Ministral 3 with the export's own values."""
    values = json.loads((directory / "config.json").read_text())
    del values["auto_map"]
    return values | {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}


def test_transformers_ministral3_takes_weights_and_config_strictly(exported: dict[str, Path], kind: str) -> None:
    directory = exported[kind]
    config = Ministral3Config(**read_text_config(directory))
    model: Any = Ministral3ForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(rename(directory, TEXT), strict=True)
    expected = compute_logits(load_export(directory, device="cpu"))
    torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01


def test_transformers_vision_wrapper_takes_them_and_they_come_back_to_the_byte(
    exported: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    wrapper, directory = tmp_path / "wrapper", exported[kind]
    make_ministral3_vlm(wrapper, model=MODELS[kind], tied=False)
    vision = load_file(wrapper / "model.safetensors")
    vision = {name: tensor for name, tensor in vision.items() if not name.startswith("language_model.")}
    save_file(vision | rename(directory, VISION), wrapper / "model.safetensors", metadata={"format": "pt"})
    text_config = json.loads((wrapper / "config.json").read_text())["text_config"] | read_text_config(directory)
    edit_json(wrapper / "config.json", text_config=text_config)
    loaded: Any = Mistral3ForConditionalGeneration.from_pretrained(wrapper, output_loading_info=True)
    model, report = loaded
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = compute_logits(load_export(directory, device="cpu"))
    torch.testing.assert_close(compute_logits(model), expected, atol=1e-4, rtol=0)
    import_checkpoint(wrapper, tmp_path / "run", MASK_TOKEN, Progress())
    export_checkpoint(tmp_path / "run", tmp_path / "again", Progress(), max_shard_bytes=10**9)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def make_release(exported: dict[str, Path], kind: str, target: Path, eos: int | list[int]) -> Path:
    """Disguise an export as a release: shards cut by transformers, other keys, code of older names, no sums."""
    directory = Path(shutil.copytree(exported[kind], target))
    (directory / "SHA256SUMS").unlink()
    (directory / "model.safetensors").unlink()
    load_export(exported[kind], device="cpu", dtype="bf16").save_pretrained(target / "new", max_shard_size=SHARD_BYTES)
    for path in (target / "new").glob("model*"):
        path.rename(target / path.name)
    shutil.rmtree(target / "new")
    number_type = ["torch_dtype", "dtype"] if kind == "instruct" else []
    edit_json(
        directory / "config.json",
        *number_type[:1],
        **dict.fromkeys(number_type[1:], "bfloat16"),
        eos_token_id=eos,
        ada_perm_ratio_per_block=None,
        attn_implementation="sdpa",
        dlm_type="llada",
        seq_length=4096,
        transformers_version="4.55.4",
        use_cache=False,
    )
    edit_json(directory / "generation_config.json", eos_token_id=eos, transformers_version="4.55.4")
    for name in ("modeling_ministral_dlm.py", "configuration_ministral_dlm.py", "chat_utils.py"):
        (directory / name).write_text("from .nowhere import nothing\n")
    (directory / "README.md").write_text("# A released model\n")
    return directory


@pytest.fixture(scope="module", params=[2, 11, [2, 11]], ids=str)
def release(exported: dict[str, Path], kind: str, request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """Make a release of this kind that ends responses with the parameter's tokens. Do not change it."""
    return make_release(exported, kind, tmp_path_factory.mktemp("release") / f"{kind}_{request.param}", request.param)


def test_a_release_loads_with_our_classes(release: Path, exported: dict[str, Path], kind: str) -> None:
    model = load_export(release, device="cpu")
    torch.testing.assert_close(compute_logits(model), compute_logits(load_export(exported[kind], device="cpu")))
    eos = json.loads((release / "config.json").read_text())["eos_token_id"]
    assert find_stop_ids(model) == (tuple(eos) if isinstance(eos, list) else (eos,))


def test_a_release_verifies_with_warnings_alone(release: Path) -> None:
    found = verify_export(release)
    outcomes = {check.name: check.outcome for check in found.checks}
    assert not found.has_failed, found.checks
    assert {name for name, outcome in outcomes.items() if outcome is not CheckOutcome.passed} <= {
        *("checksums", "code is known", "chat template")
    }
    assert outcomes["weight files"] is CheckOutcome.passed


def test_a_release_converts_and_comes_back(release: Path, exported: dict[str, Path], kind: str, tmp_path: Path) -> None:
    import_checkpoint(release, tmp_path / "run", MASK_TOKEN, Progress())
    export_checkpoint(tmp_path / "run", tmp_path / "again", Progress(), max_shard_bytes=10**9)
    assert not verify_export(tmp_path / "again").has_failed
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        exported[kind] / "model.safetensors"
    ).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (release, tmp_path / "again"))
    for key in before.keys() - {"dtype", "torch_dtype", "transformers_version"}:
        assert after[key] == before[key], key


def test_the_older_name_of_the_architecture_is_the_same_model(
    exported: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exported[kind], tmp_path / "older"))
    edit_json(directory / "config.json", architectures=["NemotronLabsDiffusionEncoderModel"])
    (directory / "SHA256SUMS").unlink()
    expected = compute_logits(load_export(exported[kind], device="cpu"))
    torch.testing.assert_close(compute_logits(load_export(directory, device="cpu")), expected)
    automatic = AutoModel.from_pretrained(directory, trust_remote_code=True)
    torch.testing.assert_close(compute_logits(automatic), expected)
    outcomes = {check.name: check.outcome for check in verify_export(directory).checks}
    assert outcomes["config keys"] is CheckOutcome.passed
    older, newer = (read_checkpoint_info(path) for path in (directory, exported[kind]))  # what init_from reads
    assert (older.export, older.eos_token_id, older.block_size) == (newer.export, newer.eos_token_id, newer.block_size)
    import_checkpoint(directory, tmp_path / "run", MASK_TOKEN, Progress())
    export_checkpoint(tmp_path / "run", tmp_path / "again", Progress(), max_shard_bytes=10**9)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported[kind] / name).read_bytes()


LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
results = {}
for directory in sys.argv[2:]:
    try:
        model, info = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert model.dtype == torch.bfloat16, model.dtype
        tokens = torch.load(sys.argv[1] + ".tokens")
        with torch.no_grad():
            logits = model.float()(input_ids=tokens).logits
        decoded = model.ar_generate(tokens[:1, :9], max_new_tokens=4)
        results[directory] = {"module": type(model).__module__, "logits": logits, "decoded": decoded}
        assert AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("<SPECIAL_100>") == 100
    except Exception as error:
        results[directory] = f"{type(error).__name__}: {error}"
torch.save(results, sys.argv[1])
"""


def load_elsewhere(folder: Path, *directories: Path) -> list[Any]:
    """Return what a process without this repository makes of the exports: results, or the message of the error."""
    torch.save(TOKENS, folder / "out.pt.tokens")
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD, str(folder / "out.pt"), *map(str, directories)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "out.pt")
    return [results[str(directory)] for directory in directories]


def test_auto_model_loads_releases_with_the_shipped_code(exported: dict[str, Path], tmp_path: Path) -> None:
    cases = [("instruct", [2, 11]), ("base", 2)]
    directories = [make_release(exported, kind, tmp_path / f"release_{kind}", eos) for kind, eos in cases]
    for (kind, _), result in zip(cases, load_elsewhere(tmp_path, *directories), strict=True):
        assert isinstance(result, dict), result
        assert result["module"].startswith("transformers_modules.")
        expected = load_export(exported[kind], device="cpu", dtype="bf16")
        torch.testing.assert_close(result["logits"], compute_logits(expected))


def test_a_checkpoint_without_a_tensor_or_a_code_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    tensor, code = (Path(shutil.copytree(exported["base"], tmp_path / name)) for name in ("no_tensor", "no_code"))
    edit_tensors(tensor / "model.safetensors", lambda tensors: tensors.pop(UP))
    (code / "rope.py").unlink()
    assert "rope.py" in load_elsewhere(tmp_path, code)[0]
    load_export(code, device="cpu")  # runs this repository's code
    with pytest.raises(UserError, match=f"lack 1 of the model's tensors, such as {UP}"):
        load_export(tensor, device="cpu")
    for directory, name in ((tensor, "tensor names"), (code, "code is complete")):
        found = {check.name: check for check in verify_export(directory).checks}
        assert found[name].outcome is CheckOutcome.failed and "missing" in found[name].detail
