"""An export as this project writes it: Ministral 3 imported, exported again, with a draft adapter of its own."""

import json
import shutil
from pathlib import Path

import pytest
from peft import get_peft_model_state_dict

from conf.schema.drafter import AdapterConfig
from data_pipeline.chat.template import load_chat_template
from lora.drafter.adapter import attach_new_adapter, save_adapter
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.progress import Progress
from model.export.load import load_export
from tests.helpers.edit_exports import edit_json
from tests.helpers.tiny_checkpoints import MASK_TOKEN, make_ministral3_vlm, tiny_model_config
from tests.model.hf.adapters import fill_adapter

SHARD_BYTES = 60_000


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save `export` (one file), `shards` (several and an index) and the `run` they came from. Do not change them."""
    folder = tmp_path_factory.mktemp("written")
    make_ministral3_vlm(folder / "hf", model=tiny_model_config(max_position_embeddings=512))
    edit_json(folder / "hf" / "config.json", eos_token_id=11)
    edit_json(folder / "hf" / "generation_config.json", eos_token_id=11)
    edit_json(folder / "hf" / "tokenizer_config.json", eos_token="<|im_end|>")
    text_config = json.loads((folder / "hf" / "config.json").read_text())["text_config"] | {"eos_token_id": 11}
    edit_json(folder / "hf" / "config.json", text_config=text_config)
    (folder / "hf" / "chat_template.jinja").write_text(load_chat_template(folder / "hf", "chatml"))
    import_checkpoint(folder / "hf", folder / "run", MASK_TOKEN, Progress())
    export_checkpoint(folder / "run", folder / "export", Progress(), max_shard_bytes=10**9)
    export_checkpoint(folder / "run", folder / "shards", Progress(), max_shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def export(written: Path, tmp_path: Path) -> Path:
    """Make a private copy of an export."""
    return Path(shutil.copytree(written / "export", tmp_path / "export"))


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """Make a private copy of an export in several files."""
    return Path(shutil.copytree(written / "shards", tmp_path / "shards"))


@pytest.fixture(scope="session")
def adapter(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a draft adapter of that export, as the trainer writes it. Do not change it."""
    folder = tmp_path_factory.mktemp("adapter") / "linear_spec_lora"
    model = attach_new_adapter(load_export(written / "export", device="cpu"), AdapterConfig(rank=4, alpha=16.0), seed=0)
    fill_adapter(model, "default", std=0.3)
    save_adapter(model, get_peft_model_state_dict(model), folder, {"step": 1})
    return folder
