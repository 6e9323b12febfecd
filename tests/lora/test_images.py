"""The draft adapter learns from prompts with images: the model responds to them, and drafts read what it saw."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conf.composition.compose import compose_drafter_config
from conf.schema.drafter import AdapterConfig, DraftObjectiveConfig, ResponsesConfig, ResponseSource
from conf.system.errors import UserError
from lora.drafter.adapter import attach_new_adapter
from lora.drafter.batches import DraftBatch, build_draft_batch
from lora.drafter.build import refuse_sharded_tower
from lora.drafter.step import DraftStep
from lora.examples.example_set import Example
from lora.examples.prompts import RecordPrompts, open_record_prompts
from lora.examples.records import prepare_examples
from lora.examples.responses import build_response_task, decode_responses, load_responses
from lora.examples.run_examples import OpenedExamples
from lora.examples.stored_examples import open_examples
from model.export.images import load_pixels
from model.export.load import attach_adapter, load_export
from tests.helpers.processes import load_lines, train_many
from tests.helpers.tiny_exports import save_tiny_export
from tests.helpers.tiny_vlm import draw_picture, save_vlm_export

LENGTH, BLOCK = 96, 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an export with images, pictures, and prompts: questions that differ in their picture alone, and a text."""
    folder = tmp_path_factory.mktemp("images")
    save_vlm_export(folder / "vlm")
    for number in range(6):
        draw_picture(folder / f"{number}.png", 30 + 20 * number, 40, seed=number)
    records: list[dict[str, Any]] = [{"texts": [{"user": "Why?"}], "images": [f"{n}.png"]} for n in range(6)]
    both = [{"type": "image_url", "image_url": {"url": f"{n}.png"}} for n in (0, 5)]
    records.append({"messages": [{"role": "user", "content": [*both, {"type": "text", "text": "the sea"}]}]})
    records += [{"prompt": "the ships go"}, {"prompt": "every day"}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def prompts(saved: Path) -> RecordPrompts:
    return open_prompts(saved)


def open_prompts(folder: Path) -> RecordPrompts:
    return open_record_prompts(
        [folder / "prompts.jsonl"], checkpoint=folder / "vlm", sequence_length=LENGTH, prompt_tokens=5
    )


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    model: Any = load_export(saved / "vlm", device="cpu")
    return model.double()


def test_prompts_that_differ_in_their_picture_alone_are_different_prompts(prompts: RecordPrompts, saved: Path) -> None:
    assert len(set(prompts.hash_documents().tolist())) == len(prompts) == 9
    chosen = np.arange(9) % 2 == 0
    some = prompts.select(chosen, "every other")
    assert [some.read_images(n) for n in range(5)] == [prompts.read_images(n) for n in range(0, 9, 2)]
    assert some.hash_documents().tolist() == prompts.hash_documents()[chosen].tolist()
    before, picture = prompts.identity, (saved / "3.png").read_bytes()
    draw_picture(saved / "3.png", 90, 40, seed=99)
    assert open_prompts(saved).identity != before, "another picture of the same size is another prompt"
    (saved / "3.png").write_bytes(picture)
    assert open_prompts(saved).identity == before


def test_responses_are_greedy_ars_with_the_images(prompts: RecordPrompts, model: Any, tmp_path: Path) -> None:
    config = ResponsesConfig(source=ResponseSource.greedy, max_new_tokens=10, batch_size=2, prompts_per_shard=4)
    task = build_response_task(
        prompts, config, cache=tmp_path, checkpoint="one", dtype=model.dtype, stop_ids=(11,), seed=0
    )
    decode_responses(model, task)
    examples = load_responses(task)
    for number, example in enumerate(examples):
        ids = torch.tensor(prompts.read(number))[None]
        pixels = load_pixels(prompts.read_images(number))
        output, _ = model.ar_generate(ids, max_new_tokens=10, eos_token_id=11, **pixels)
        assert output[0].tolist() == example.tokens.tolist()
        assert example.images == prompts.read_images(number)
        assert example.drafted.tolist() == [False] * ids.shape[1] + [True] * (len(example.tokens) - ids.shape[1])


def test_prepared_chats_bring_their_images(saved: Path, model: Any, tmp_path: Path) -> None:
    """Prepare writes tokens of records with responses; a picture that does not fit is left out with its prompt."""
    turns = [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": "Why?"}]
    again = [{"type": "image_url", "image_url": {"url": "5.png"}}, {"type": "text", "text": "the ships"}]
    spoken = [{"role": "assistant", "content": "The sea is wide and blue."}]
    chat = [{"role": "user", "content": turns}, *spoken, {"role": "user", "content": again}, *spoken]
    records = [{"messages": chat[:2]}, {"messages": chat}]
    (saved / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokens = prepare_examples(saved / "chats.jsonl", checkpoint=saved / "vlm", folder=tmp_path / "tokens")
    options: dict[str, Any] = {"checkpoint": saved / "vlm", "folder": tmp_path / "tokens"}
    examples = open_examples(saved / "chats.jsonl", sequence_length=500, **options)
    assert tokens == tmp_path / "tokens" and examples.has_images
    assert [len(example.images) for example in examples] == [1, 2]
    assert len(set(examples.hash_documents().tolist())) == 2
    for example in examples:
        with torch.no_grad():  # refuses images that do not match the tokens
            model(torch.from_numpy(example.tokens)[None], **load_pixels(example.images))
        batch = build_draft_batch([example], [0], blocks=2, block_size=BLOCK, seed=0)
        assert torch.isfinite(make_step(saved)(batch)[0])
    whole, first = examples[1], len(examples[0].tokens)
    for length in (first + 3, len(whole.tokens) - 3):
        cut = open_examples(saved / "chats.jsonl", sequence_length=length, **options)[1]
        assert len(cut.images) == (1 if length == first + 3 else 2) and cut.drafted[-1]
        assert cut.tokens.tolist() == whole.tokens[: len(cut.tokens)].tolist() and len(cut.tokens) <= length
    save_tiny_export(tmp_path / "text")
    with pytest.raises(UserError, match=r"tokenised with tokenizer|reads text alone"):
        open_examples(tokens, checkpoint=tmp_path / "text", sequence_length=500, folder=tokens)


def build_batch(prompts: RecordPrompts, numbers: list[int]) -> DraftBatch:
    generator = np.random.default_rng(0)
    examples = []
    for number in numbers:
        prompt = prompts.read(number)
        tokens = np.concatenate([prompt, generator.integers(101, 380, 40)])
        examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), prompts.read_images(number)))
    return build_draft_batch(examples, list(range(len(numbers))), blocks=3, block_size=BLOCK, seed=0)


def make_step(saved: Path) -> DraftStep:
    model: Any = load_export(saved / "vlm", device="cpu")
    adapted = attach_new_adapter(model, AdapterConfig(rank=4, alpha=16.0), seed=3).double()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return DraftStep(adapted, DraftObjectiveConfig(), model.config.mask_token_id, chunk_blocks=3)


def test_blocks_are_drafted_after_what_the_model_saw(prompts: RecordPrompts, saved: Path) -> None:
    step, batch = make_step(saved), build_batch(prompts, [0, 7, 6])
    loss, sums = step(batch)
    loss.backward()
    trained = {name for name, parameter in step.named_parameters() if parameter.grad is not None}
    assert trained and all(".layers." in name and "lora_" in name and "vision_tower" not in name for name in trained)
    # The embeddings of the whole batch, computed by the model itself, in place of those of the tokens.
    embedded = step.base.embed_prompt(batch.tokens, **load_pixels(batch.images))
    blind = DraftBatch(batch.tokens, batch.num_tokens, batch.anchors, batch.scored, batch.draws)
    unseen = step(blind)[1]
    embedding = step.base.encoder.embed_tokens
    hook = embedding.register_forward_hook(lambda _, given, out: embedded if given[0] is blind.tokens else out)
    torch.testing.assert_close(step(blind)[1], sums)
    hook.remove()
    assert (unseen - sums).abs().max() > 1e-3, "the images must matter"


def test_an_adapter_is_trained_saved_and_drafts(saved: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "linear_spec_lora"
    given = [f"checkpoint={saved}/vlm", f"data={saved}/prompts.jsonl", "responses.source=greedy", f"output={output}"]
    given += [f"run.dir={run}", "adapter.rank=4", "adapter.alpha=16", "train.steps=2", "train.global_batch_size=2"]
    given += [
        "train.micro_batch_size=1",
        f"train.sequence_length={LENGTH}",
        "train.blocks_per_sequence=3",
        "zero.stage=0",
    ]
    given += ["responses.max_new_tokens=16", "runtime.dtype=fp32", "runtime.device=cpu", "runtime.progress_bar=false"]
    given += ["evaluation.share=0.2", "schedule.peak_lr=1e-2", "runtime.tensorboard=false"]
    train_many(1, [given], tmp_path, "tests.helpers.drafter_jobs")
    assert [line["step"] for line in load_lines(run, "train")] == [1, 2]
    weights = load_file(output / "adapter_model.safetensors")
    assert len(weights) == 4 and not any("vision" in name for name in weights)
    model: Any = load_export(saved / "vlm", device="cpu")
    attach_adapter(model, output)
    assert not any("lora" in name for name, _ in model.encoder.vision_tower.named_parameters())
    prompts = open_prompts(saved)
    pixels = load_pixels(prompts.read_images(6))
    ids = torch.tensor(prompts.read(6))[None]
    greedy, _ = model.ar_generate(ids, max_new_tokens=24, **pixels)
    assert model.linear_spec_generate(ids, max_new_tokens=24, **pixels)[0].tolist() == greedy.tolist()


def test_a_tower_is_not_sharded(prompts: RecordPrompts) -> None:
    config = compose_drafter_config(["checkpoint=x", "data=y", "responses.source=greedy", "zero.stage=3"])
    with pytest.raises(UserError, match=r"zero.stage=3 .* images: set zero.stage to 2 or less"):
        refuse_sharded_tower(config, OpenedExamples(prompts, prompts))
