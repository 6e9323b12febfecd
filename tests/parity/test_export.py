"""An exported model computes what the trained one does, with its weights rounded to the export's bf16.

AR mode: the causal forward. Draft mode: a block whose first token is clean and whose rest is masked, after a clean
prefix; training computes it in the noisy half, the export in its first forward over the block.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from conf.schema import AttentionBackend, Dtype, ModelConfig, ParallelConfig, PrecisionConfig
from data_pipeline.packing.form import SequenceForm
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout
from model.checkpoint.layout import load_checkpoint_manifest, model_config_from, resolve_checkpoint
from model.convert.conversion import export_checkpoint
from model.convert.load_weights import load_megatron_weights
from model.convert.progress import Progress
from model.megatron.build import build_model_chunks
from model.megatron.tri_mode import TriModeModel
from pretrain.run.process_group import Ranks
from tests.helpers.layouts import PP2_INTERLEAVED
from tests.helpers.packed import pack_chats
from tests.helpers.processes import train_many
from tests.helpers.toy_data import SEQUENCE_LENGTH, ToyData, tokens_of
from tests.parity.test_import import compute_ar_logits

BLOCK = 16
LENGTH = 96
MASK = 100


@dataclass(frozen=True)
class Exported:
    """A run trained for a few joint steps (interleaved pipeline), rounded to bf16, and its export loaded in fp32."""

    model: ModelConfig
    trained: TriModeModel
    exported: Any
    directory: Path


@pytest.fixture(scope="module")
def pair(ranks: Ranks, toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Train, export and load both sides."""
    root = tmp_path_factory.mktemp("export")
    short_context = ["model.rope.original_max_position_embeddings=32", *PP2_INTERLEAVED]
    train_many(
        2,
        [[*toy_data.overrides(), "stage=joint", f"run.root={root}", "run.name=run", tokens_of(6), *short_context]],
        root,
    )
    step = resolve_checkpoint(root / "run")
    model = model_config_from(load_checkpoint_manifest(step).model, str(step))
    [trained] = build_model_chunks(model, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=64)
    load_megatron_weights([trained], step, model)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.copy_(weight.bfloat16().float())
    export_checkpoint(root / "run", root / "export", Progress(), max_shard_bytes=10**6)
    exported = AutoModel.from_pretrained(root / "export", trust_remote_code=True, dtype=torch.float32).eval()
    return Exported(model, trained.eval(), exported, root / "export")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Draw [2, LENGTH] tokens, past the short original context, without the mask token."""
    drawn = torch.randint(101, 384, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    assert SEQUENCE_LENGTH < LENGTH
    return drawn


@torch.no_grad()
def test_ar_logits_equal_the_trained_models(pair: Exported, tokens: torch.Tensor) -> None:
    expected = compute_ar_logits(pair.trained, pair.model, tokens)
    assert (pair.exported(tokens).logits - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_draft_logits_equal_the_noisy_half_of_training(pair: Exported, tokens: torch.Tensor) -> None:
    noisy = torch.where(torch.arange(LENGTH) % BLOCK == 0, tokens, MASK)
    plans = PlanBuilder(pair.model, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    plan = plans.build(build_regular_layout(LENGTH, BLOCK), doubled=True)
    trained = pair.trained(torch.cat([noisy, tokens], dim=1), plan).transpose(0, 1)[:, :LENGTH]
    for start in range(0, LENGTH, BLOCK):
        cache = None
        if start:
            cache = pair.exported(tokens[:, :start], use_cache=True).past_key_values
        block = noisy[:, start : start + BLOCK]
        draft = pair.exported(block, past_key_values=cache, bidirectional=True, commit=False).logits
        assert (draft - trained[:, start : start + BLOCK]).abs().max() <= 1e-4, f"block at {start}"


@torch.no_grad()
def test_first_forward_of_generate_is_the_draft_forward(pair: Exported, tokens: torch.Tensor) -> None:
    """With threshold 0 the first forward over a block commits all of it: its argmax must be training's."""
    prompt = tokens[:1, :BLOCK]
    output, num_forwards = pair.exported.generate(
        prompt, max_new_tokens=BLOCK, block_length=BLOCK, threshold=0.0, temperature=0.0, eos_token_id=[]
    )
    assert num_forwards == 2
    noisy = torch.full((1, 2 * BLOCK), MASK)
    noisy[0, 0], noisy[0, BLOCK] = prompt[0, 0], output[0, BLOCK]
    clean = torch.cat([prompt, output[:, BLOCK:]], dim=1)
    plans = PlanBuilder(pair.model, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    plan = plans.build(build_regular_layout(2 * BLOCK, BLOCK), doubled=True)
    logits = pair.trained(torch.cat([noisy, clean], dim=1), plan).transpose(0, 1)[0, BLOCK : 2 * BLOCK]
    logits[:, MASK] = -torch.inf
    assert output[0, BLOCK + 1 :].tolist() == logits.argmax(-1)[1:].tolist()


@torch.no_grad()
def test_packed_chats_are_trained_on_as_they_are_decoded(pair: Exported) -> None:
    """Answers after prompts of any length, later turns, several chats in a sequence, partial last blocks."""
    batch = pack_chats([[[20, 21, 5, 30], [3, 40]], [[9], [35, 17, 1, 1]]], SequenceForm(192, BLOCK, BLOCK), 384)
    is_first = torch.cat([torch.ones(2, 1, dtype=torch.bool), batch.block_ids.diff(dim=1) > 0], dim=1)
    noisy = torch.where((batch.loss_mask | batch.block_padding) & ~is_first, MASK, batch.tokens)
    plans = PlanBuilder(pair.model, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    logits = pair.trained(torch.cat([noisy, batch.tokens], dim=1), plans.build(batch.layout, doubled=True)).transpose(
        0, 1
    )
    noisy_logits, clean_logits = logits[:, :192], logits[:, 192:]

    num_blocks = 0
    for row in range(2):
        for document in range(int(batch.document_ids[row].max()) + 1):
            text = ((batch.document_ids[row] == document) & ~batch.block_padding[row]).nonzero().flatten()
            tokens = batch.tokens[row, text]
            assert (pair.exported(tokens[None]).logits[0] - clean_logits[row, text]).abs().max() <= 1e-4
            for start in (is_first[row] & batch.loss_mask[row]).nonzero().flatten().tolist():
                if batch.document_ids[row, start] == document:
                    num_blocks += 1
                    before = batch.tokens[row, text[text < start]][None]
                    cache = pair.exported(before, use_cache=True).past_key_values if before.numel() else None
                    block = noisy[row, start : start + BLOCK][None]
                    draft = pair.exported(block, past_key_values=cache, bidirectional=True, commit=False).logits[0]
                    assert (draft - noisy_logits[row, start : start + BLOCK]).abs().max() <= 1e-4, f"block at {start}"
    assert num_blocks == 2 + 2 + 3 + 1 + 2 + 1
