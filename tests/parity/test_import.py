"""An imported Ministral 3 computes transformers' own logits, in every spelling and past the original context."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import AttentionBackend, Dtype, ModelConfig, ParallelConfig, PrecisionConfig
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout
from model.convert.load_weights import load_hf_weights
from model.megatron.build import build_model_chunks
from model.megatron.tri_mode import TriModeModel
from pretrain.run.process_group import Ranks
from tests.helpers.tiny_checkpoints import ORIGINAL_MAX_POSITIONS, make_ministral3_vlm, tiny_model_config

LENGTH = 5 * ORIGINAL_MAX_POSITIONS

CASES: dict[str, dict[str, Any]] = {
    "tied_as_the_3b": {"tied": True},
    "untied_as_the_8b": {"tied": False},
    "transformers_5_spelling": {"spelling": "transformers5", "tied": False},
    "text_only": {"spelling": "text", "tied": False},
    "sharded_with_index": {"shards": True},
    "factor_of_the_released_3b": {"factor": 0.25},
    "correction_range_not_rounded": {"model": tiny_model_config(truncate=False)},
    "theta_of_the_14b": {"model": tiny_model_config(theta=1e9), "tied": False},
}


def build_imported(directory: Path, model: ModelConfig) -> TriModeModel:
    """Build an fp32 model of one rank with the checkpoint's weights."""
    [chunk] = build_model_chunks(model, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=64)
    load_hf_weights([chunk], directory, model)
    return chunk.eval()


def compute_ar_logits(chunk: TriModeModel, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [B, S, V] of the AR forward."""
    plans = PlanBuilder(model, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    plan = plans.build(build_regular_layout(tokens.shape[1], tokens.shape[1]), doubled=False)
    return chunk(tokens, plan).transpose(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_imported_logits_equal_transformers(ranks: Ranks, tmp_path: Path, case: str) -> None:
    arguments = CASES[case]
    model = arguments.get("model") or tiny_model_config(factor=arguments.get("factor", 16.0))
    theirs = make_ministral3_vlm(tmp_path, dtype=torch.float32, **arguments).eval()
    tokens = torch.randint(0, model.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        actual = compute_ar_logits(build_imported(tmp_path, model), model, tokens)
    assert (actual - expected).abs().max() <= 1e-4
    assert expected.std() > 0.05, "logits that hardly vary would prove nothing"


def test_row_11_trains_although_the_start_checkpoint_calls_it_padding(ranks: Ranks, tmp_path: Path) -> None:
    model = tiny_model_config()
    make_ministral3_vlm(tmp_path, dtype=torch.float32)
    chunk = build_imported(tmp_path, model)
    compute_ar_logits(chunk, model, torch.tensor([[20, 11, 30, 40]])).square().sum().backward()
    grad = chunk.embedding.word_embeddings.weight.grad
    assert grad is not None
    assert grad[11].abs().max() > 0
