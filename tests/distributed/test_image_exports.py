"""A merged model goes through the stage that trains it and comes out as an export, whatever the layout.

Under a learning rate too small to change a weight, the export holds the merged weights bit for bit, but for zeros.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.composition.compose import compose_run_config
from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.pictures import load_picture_questions, write_parquet
from data_pipeline.toy.tokenizer import MASK_TOKEN, save_tokenizer, train_tokenizer
from model.convert.conversion import export_checkpoint
from model.convert.hf_target import copy_tokenizer_files
from model.convert.merge import merge_checkpoints
from model.convert.progress import Progress
from model.export.images import load_image_reader, load_pixels
from model.export.load import load_export, load_export_tokenizer
from model.hf.image_tokens import list_image_tokens
from model.verify_export.verification import verify_export
from tests.helpers.layouts import PP2, TP2
from tests.helpers.processes import load_lines, train_many
from tests.helpers.tiny_checkpoints import make_ministral3_vlm
from tests.helpers.tiny_vlm import draw_picture

LENGTH, VOCAB_SIZE = 256, 384
LAYOUTS = {"tp2": TP2, "pp2": PP2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge a toy in the shape of model=tiny_vlm, and prepare questions with its tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    split = load_picture_questions(24, 2)
    model = compose_run_config(["model=tiny_vlm", "data.train=x", "data.tokenizer=x", "train.tokens=1"]).model
    options: dict[str, Any] = {"model": model, "tied": False, "dtype": torch.float32}
    make_ministral3_vlm(folder / "text", spelling="text", tokenizer=False, seed=1, **options)
    make_ministral3_vlm(folder / "ministral", vision=model.vision, **options)
    texts = [f"{asked.question} {asked.response}" for asked in split.train]
    save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), folder / "tokenizer")
    copy_tokenizer_files(folder / "tokenizer", folder / "text")
    merge_checkpoints(
        folder / "text",
        folder / "ministral",
        folder / "merged",
        MASK_TOKEN,
        Progress(),
        dtype=torch.float32,
        max_shard_bytes=10**9,
    )
    write_parquet(split.train, folder / "train.parquet")
    input_ = InputConfig(DocumentKind.image_chat, files=str(folder / "train.parquet"), column="texts")
    settings = PrepareConfig(workers=1, chat_template="chatml")
    source = SourceConfig(path=str(folder / "train"), input=input_)
    prepare_source("train", source, DataConfig(tokenizer=str(folder / "merged"), prepare=settings))
    return folder


def train(folder: Path, layout: str) -> Path:
    """Train a step in a layout of two ranks; return the run folder."""
    given = [
        *("stage=vlm", "model=tiny_vlm", "precision=fp32", "runtime=cpu", "parallel=single", "stage.block_size=16"),
        *("runtime.progress_bar=false", "runtime.tensorboard=false", f"init_from={folder / 'merged'}"),
        *(f"data.train={folder / 'train'}", f"data.tokenizer={folder / 'merged'}", f"data.sequence_length={LENGTH}"),
        *("train.global_batch_size=2", "train.micro_batch_size=1", f"train.tokens={2 * LENGTH}"),
        *("schedule.peak_lr=1e-30", "schedule.final_lr=1e-30", "optimizer.weight_decay=0", f"run.root={folder}"),
    ]
    train_many(2, [[*given, f"run.name={layout}", *LAYOUTS[layout]]], folder, timeout=500)
    return folder / layout


@pytest.mark.parametrize("layout", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_what_was_merged_is_trained_and_exported(folder: Path, layout: str) -> None:
    run = train(folder, layout)
    [line] = load_lines(run, "train")
    assert line["images"] > 0 and line["loss"] > 0
    export = folder / f"export_{layout}"
    export_checkpoint(run, export, Progress(), dtype=torch.float32, max_shard_bytes=10**9)
    assert not verify_export(export).has_failed
    merged, exported = (load_file(path / "model.safetensors") for path in (folder / "merged", export))
    assert merged.keys() == exported.keys()
    for name, weight in merged.items():
        assert (weight - exported[name]).abs().max() < 1e-28, name
    read_image = load_image_reader(export, load_export_tokenizer(export))
    assert read_image is not None
    image = read_image(draw_picture(folder / "picture.png", 60, 40))
    model: Any = load_export(export, device="cpu")
    ids = torch.tensor([[10, *list_image_tokens(image.grid), 200, 11]])
    greedy, _ = model.ar_generate(ids, max_new_tokens=8, **load_pixels([image]))
    assert torch.equal(model.linear_spec_generate(ids, max_new_tokens=8, **load_pixels([image]))[0], greedy)
