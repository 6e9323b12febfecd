"""An export after instruct tuning is an instruct checkpoint, and decodes from a chat prompt what training computed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conf.schema import AttentionBackend, Dtype, ParallelConfig, PrecisionConfig
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, lay_out
from data_pipeline.toy.corpus import load_docstring_chats
from model.attention.plan import PlanBuilder
from model.checkpoint.layout import load_checkpoint_manifest, model_config_from, resolve_checkpoint
from model.convert.conversion import export_checkpoint
from model.convert.load_weights import load_megatron_weights
from model.convert.progress import Progress
from model.megatron.build import build_model_chunks
from model.megatron.tri_mode import TriModeModel
from pretrain.run.process_group import Ranks
from tests.helpers.layouts import TP2
from tests.helpers.processes import load_lines, train_many
from tests.helpers.toy_data import ToyData, tokens_of

BLOCK, MASK, END_OF_TURN = 16, 100, 11


@dataclass(frozen=True)
class Instruct:
    """A run of a few steps of joint training, then of instruct tuning, in fp32, and its export."""

    run: Path
    directory: Path
    trained: TriModeModel
    exported: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def instruct(ranks: Ranks, toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Instruct:
    root = tmp_path_factory.mktemp("sft")
    joint = [*toy_data.overrides(), "stage=joint", "run.name=joint", tokens_of(4)]
    sft = [*toy_data.overrides(chats=True), "stage=sft", "run.name=sft", tokens_of(6, chats=True)]
    train_many(2, [[*job, *TP2, f"run.root={root}"] for job in (joint, [*sft, f"init_from={root}/joint"])], root)
    step = resolve_checkpoint(root / "sft")
    model = model_config_from(load_checkpoint_manifest(step).model, str(step))
    [trained] = build_model_chunks(model, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=64)
    load_megatron_weights([trained], step, model)
    export_checkpoint(root / "sft", root / "export", Progress(), dtype=torch.float32, max_shard_bytes=10**6)
    exported = AutoModel.from_pretrained(root / "export", trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "export", trust_remote_code=True)
    return Instruct(root / "sft", root / "export", trained.eval(), exported, tokenizer)


@pytest.fixture
def prompt_ids(instruct: Instruct) -> torch.Tensor:
    """Return [1, P]: a held-out question in the export's own template."""
    messages = load_docstring_chats().heldout[0]["messages"][:1]
    rendered = instruct.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    return rendered["input_ids"]


def test_it_says_that_a_turn_ends_with_im_end(instruct: Instruct) -> None:
    for name in ("config.json", "generation_config.json"):
        assert json.loads((instruct.directory / name).read_text())["eos_token_id"] == END_OF_TURN
    assert (instruct.directory / "chat_template.jinja").read_text() == CHATML_PATH.read_text()
    assert instruct.tokenizer.eos_token == "<|im_end|>"
    assert instruct.tokenizer.eos_token_id == END_OF_TURN
    manifest = load_checkpoint_manifest(resolve_checkpoint(instruct.run))
    assert (manifest.stage, manifest.eos_token_id) == ("sft", END_OF_TURN)


def test_a_chat_prompt_is_decoded_in_three_modes(instruct: Instruct, prompt_ids: torch.Tensor) -> None:
    text = instruct.tokenizer.decode(prompt_ids[0])
    assert text.startswith("<|im_start|>") and text.endswith("<|im_start|>assistant\n")
    options = {"max_new_tokens": 32, "temperature": 0.0, "eos_token_id": END_OF_TURN}
    ar, num_forwards = instruct.exported.ar_generate(prompt_ids, **options)
    assert ar.shape[1] - prompt_ids.shape[1] == num_forwards <= 32
    linear, _ = instruct.exported.linear_spec_generate(prompt_ids, block_length=BLOCK, **options)
    assert torch.equal(linear, ar)
    diffusion, _ = instruct.exported.generate(prompt_ids, block_length=BLOCK, threshold=0.9, **options)
    assert torch.equal(diffusion[:, : prompt_ids.shape[1]], prompt_ids)


@torch.no_grad()
def test_training_computes_the_first_forward_over_a_response(instruct: Instruct, prompt_ids: torch.Tensor) -> None:
    """The noisy block leaves the response's first token, as decoding's seed, and masks the rest."""
    output, num_forwards = instruct.exported.generate(
        prompt_ids, max_new_tokens=BLOCK, block_length=BLOCK, threshold=0.0, temperature=0.0, eos_token_id=[]
    )
    assert num_forwards == 2, "prefill, and one forward that commits the whole block"
    length = prompt_ids.shape[1]
    lengths, is_prompt = np.array([length, BLOCK]), np.array([True, False])
    segments = Segments(output[0].numpy(), lengths, np.zeros(2, dtype=np.int64), is_prompt)
    form = SequenceForm(-(-length // BLOCK) * BLOCK + 2 * BLOCK, BLOCK, BLOCK)
    batch = lay_out(segments, form, END_OF_TURN)
    start = int(batch.loss_mask[0].nonzero()[0])
    noisy = batch.tokens.clone()
    noisy[0, start + 1 : start + BLOCK] = MASK

    model = model_config_from(load_checkpoint_manifest(resolve_checkpoint(instruct.run)).model, "")
    plan = PlanBuilder(model, AttentionBackend.cpu, torch.float32, torch.device("cpu")).build(
        batch.layout, doubled=True
    )
    hidden = instruct.trained(torch.cat([noisy, batch.tokens], dim=1), plan).transpose(0, 1)
    trained = hidden[0, start : start + BLOCK]

    cache = instruct.exported(prompt_ids, use_cache=True).past_key_values
    block = noisy[:, start : start + BLOCK]
    decoded = instruct.exported(block, past_key_values=cache, bidirectional=True, commit=False).logits[0]
    assert (decoded - trained).abs().max() <= 1e-4
    trained[:, MASK] = -torch.inf
    assert output[0, length + 1 :].tolist() == trained.argmax(-1)[1:].tolist()


def test_every_token_is_accounted_for(instruct: Instruct, toy_data: ToyData) -> None:
    """Tokens of each kind sum to the step, and in an epoch those used and left out sum to what is stored."""
    kinds = ("text_tokens", "context_tokens", "block_padding_tokens", "padding_tokens")
    lines = load_lines(instruct.run, "train")
    for line in lines:
        assert sum(line[kind] for kind in kinds) == 8 * 192
        assert 0 < line["masked_tokens"] <= line["text_tokens"] + line["block_padding_tokens"]
    assert all(sum(line[kind] for line in lines) > 0 for kind in kinds)
    [data] = load_lines(instruct.run, "data")
    counts = {key.partition("/")[2]: value for key, value in data.items() if "/" in key}
    stored = json.loads((toy_data.train_chats / "manifest.json").read_text())
    assert counts["tokens"] + counts["truncated_tokens"] + counts["dropped_tokens"] == stored["tokens"]
    assert counts["documents"] + counts["dropped_chats"] == stored["documents"]
