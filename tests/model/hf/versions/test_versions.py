"""Exports load, decode and are used alike in every supported transformers, each in an environment of its own (slow).

An environment is a folder of a few packages that comes before those of the test's own, so that torch is shared.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import __version__ as own_version

from conf.schema import ModelConfig
from conf.schema.drafter import AdapterConfig
from data_pipeline.chat.template import load_chat_template
from lora.drafter.adapter import attach_new_adapter, save_adapter
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.progress import Progress
from model.export.load import load_export
from tests.helpers.tiny_checkpoints import MASK_TOKEN, make_ministral3_vlm, tiny_model_config
from tests.model.hf.versions.load_and_use import MODES, USES

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("load_and_use.py")
OLD = ["huggingface-hub<1", "requests", "datasets==4.4.1"]
# Each with the packages it needs in other versions than ours.
PACKAGES = {
    "4.55.4": [*OLD, "tokenizers<0.22"],
    "4.57.3": [*OLD, "tokenizers==0.22.2"],
    "4.57.6": [*OLD, "tokenizers==0.22.2"],
    "5.0.0": ["huggingface-hub>=1.5,<2", "tokenizers==0.22.2"],
    "5.6.0": ["huggingface-hub>=1.5,<2", "tokenizers==0.22.2"],
    own_version: [],
    "5.24.0": [],  # the newest on the day of the table in model/hf/README.md
}
TOO_OLD, *SUPPORTED = PACKAGES
BY_TRANSFORMERS = "draft adapter by load_adapter"  # refused in 5.0 to 5.5, which read no weight of it
VOCAB_SIZE = 101_000  # transformers looks closer at a tokenizer of more than 100,000 tokens


def save_large_tokenizer(directory: Path) -> None:
    """Save a tokenizer as Ministral 3 has it: over 100,000 tokens, bos from a template, in the words of version 5."""
    path = directory / "tokenizer.json"
    small = json.loads(path.read_text())
    vocabulary = small["model"]["vocab"]
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in small["model"]["merges"]]))
    tokenizer.add_special_tokens([token["content"] for token in small["added_tokens"]])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    config = {
        "add_bos_token": True,
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "is_local": True,
        "tokenizer_class": "TokenizersBackend",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_export(directory: Path, model: ModelConfig, has_adapter: bool) -> Path:
    """Make an export as a user does: import Ministral 3, export, and perhaps add a draft adapter."""
    make_ministral3_vlm(directory / "hf", model=model, tied=False, spelling="text")
    save_large_tokenizer(directory / "hf")
    (directory / "hf" / "chat_template.jinja").write_text(load_chat_template(directory / "hf", "chatml"))
    import_checkpoint(directory / "hf", directory / "run", MASK_TOKEN, Progress())
    export = directory / "export"
    export_checkpoint(directory / "run", export, Progress(), dtype=torch.float32, max_shard_bytes=10**9)
    if has_adapter:
        adapted = attach_new_adapter(load_export(export, device="cpu"), AdapterConfig(rank=4, alpha=16.0), seed=0)
        tensors = get_peft_model_state_dict(adapted)
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(tensor.shape, generator=generator) / 10 for name, tensor in tensors.items()}
        save_adapter(adapted, tensors, export / "linear_spec_lora", {"step": 1})
    return export


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a base model, and an instruct model with a draft adapter."""
    folder = tmp_path_factory.mktemp("exports")
    base = tiny_model_config(
        vocab_size=VOCAB_SIZE, factor=0.25, original_max_position_embeddings=512, max_position_embeddings=128
    )
    instruct = tiny_model_config(vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    return {
        "base": make_export(folder / "base", base, has_adapter=False),
        "instruct": make_export(folder / "instruct", instruct, has_adapter=True),
    }


def install(version: str, folder: Path) -> Path:
    """Install transformers `version` and what it needs otherwise into `folder`."""
    packages = [f"transformers=={version}", *PACKAGES[version]]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module", params=SUPPORTED)
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables that choose a version of transformers, which finds neither this repository nor a network."""
    folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
    paths = {} if request.param == own_version else {"PYTHONPATH": str(install(request.param, folder / "packages"))}
    return isolate(folder) | paths | {"VERSION": request.param}


def isolate(folder: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return variables | {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def use(name: str, environment: dict[str, str], folder: Path, *uses: str, status: int = 0) -> Any:
    """Run the script of uses; return its results, or with another status what it printed."""
    command = [sys.executable, str(SCRIPT), name, str(folder / "out.json"), *uses]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def expected(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of our own version."""
    folder = tmp_path_factory.mktemp("expected")
    return {kind: use(str(export), isolate(folder), folder) for kind, export in exports.items()}


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_an_export_is_used_alike_in_every_version(
    kind: str, exports: dict[str, Path], environment: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = use(str(exports[kind]), environment, tmp_path)
    assert found["version"] == environment["VERSION"]
    assert found["warnings"] == []
    wanted = expected[kind] | {"version": environment["VERSION"]}
    if kind == "instruct" and environment["VERSION"] == "5.0.0":
        assert "changes nothing" in found.pop(BY_TRANSFORMERS) and wanted.pop(BY_TRANSFORMERS)
    assert found == wanted
    decoded = found["decoding in all modes"]
    assert decoded["ar"] == decoded["linear"] == decoded["quadratic"]
    assert decoded.keys() == {*MODES}


def test_the_uses_are_those_of_the_table(expected: dict[str, Any]) -> None:
    assert expected["instruct"].keys() == {"version", "warnings", *USES}
    drafted = [expected["instruct"][use] for use in ("draft adapter by PEFT", BY_TRANSFORMERS)]
    assert drafted[0] == drafted[1]
    assert drafted[0]["weights"][0] == 2 * 4 and drafted[0]["weights"][1] > 1  # A and B of four layers


def test_a_hub_serves_it_from_its_cache(
    exports: dict[str, Path], environment: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Both by the name of its repository and as a folder of links to blobs."""
    snapshot = store_in_hub_cache(exports["instruct"], Path(environment["HF_HOME"]) / "hub")
    # 4.57.3 asks the hub about every tokenizer of more than 100,000 tokens that it has not got as a folder.
    by_name = [] if environment["VERSION"] == "4.57.3" else ["someone/export"]
    for name in (*by_name, str(snapshot)):
        found = use(name, environment, tmp_path, "config and tokenizer", "decoding in all modes")
        wanted = expected["instruct"]["decoding in all modes"]
        assert {mode: found["decoding in all modes"][mode] for mode in MODES} == {mode: wanted[mode] for mode in MODES}
        assert found["config and tokenizer"] == expected["instruct"]["config and tokenizer"]
        # Code that is fetched for the first time is announced, and should be.
        assert all("was downloaded from" in message for message in found["warnings"])


def store_in_hub_cache(export: Path, cache: Path) -> Path:
    """Store an export as huggingface_hub does: blobs, and a snapshot of relative links to them."""
    repository = cache / "models--someone--export"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.rmtree(repository, ignore_errors=True)
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in export.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / path.relative_to(export)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_an_older_version_gets_one_message(exports: dict[str, Path], tmp_path: Path) -> None:
    environment = isolate(tmp_path) | {"PYTHONPATH": str(install(TOO_OLD, tmp_path / "packages"))}
    *_, version, remedy = use(str(exports["base"]), environment, tmp_path, status=1).strip().splitlines()
    assert "transformers>=4.57 is required" in version and f"found transformers=={TOO_OLD}" in version
    assert remedy == "This checkpoint's code needs it: pip install -U transformers"
