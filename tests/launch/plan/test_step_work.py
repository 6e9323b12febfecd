"""FLOPs and attended pairs equal those of torch's counter, of the dense reference mask and of the trainer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from conf.composition.compose import compose_size
from conf.schema import AttentionBackend, RunConfig, RuntimeConfig
from data_pipeline.batch import Batch, SequenceLayout
from launch.plan.step_work import count_work
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout, compute_dense_mask
from model.megatron.build import build_model_chunks
from pretrain.costs import count_attended_pairs
from pretrain.objective.losses import weigh
from pretrain.run.model_parallel import distributed_session
from tests.helpers.objective import ObjectiveInput, apply_objective

SIZES = [(1, 1), (8, 4), (32, 8), (48, 48), (60, 1), (96, 24), (128, 32), (288, 48), (50, 16), (7, 32), (333, 32)]
TINY = ["model=tiny", "runtime=cpu", "precision=fp32", "train.tokens=1e6", "train.global_batch_size=1"]
FORM = ["data.sequence_length=128", "stage.block_size=32", "runtime.loss_chunk_rows=64"]


def compose(stage: str, *overrides: str) -> RunConfig:
    return compose_size([f"stage={stage}", *TINY, *FORM, *overrides])


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("length", "block_size"), SIZES)
def test_attended_pairs_are_the_sum_of_the_dense_mask(length: int, block_size: int, doubled: bool) -> None:
    mask = compute_dense_mask(build_regular_layout(length, block_size), doubled)
    assert count_attended_pairs(length, block_size, doubled) == int(mask.sum())


def test_the_closed_forms_are_those_of_whole_blocks() -> None:
    length, block = 4096, 32
    assert count_attended_pairs(length, block, doubled=False) == length * (length + 1) // 2
    assert count_attended_pairs(length, block, doubled=True) == length**2 + length * (block + 1) // 2


@pytest.mark.parametrize("stage", ["ar", "joint"])
def test_attended_pairs_of_packed_documents_are_the_sum_of_the_dense_mask(stage: str) -> None:
    config = compose(stage)
    lengths = torch.tensor([48, 48, 32])
    documents = torch.repeat_interleave(torch.arange(3), lengths)[None]
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    blocks = torch.cumsum(positions % 32 == 0, dim=1) - 1
    packed = SequenceLayout(documents, blocks, positions, torch.zeros_like(documents, dtype=torch.bool))
    assert count_work(config, document_tokens=48).attended_pairs == int(
        compute_dense_mask(packed, stage == "joint").sum()
    )


def test_documents_that_see_each_other_are_one() -> None:
    config = compose("ar", "data.isolate_documents=false")
    assert count_work(config, document_tokens=16).attended_pairs == count_attended_pairs(128, 32, doubled=False)


@pytest.fixture
def single_process() -> Iterator[None]:
    config = compose("ar")
    with distributed_session(config.parallel, RuntimeConfig(), seed=1):
        yield


@pytest.mark.parametrize("stage", ["ar", "joint"])
def test_matmuls_with_weights_are_those_torch_counts_in_the_model(stage: str, single_process: None) -> None:
    # Fully masked, so that the expected number of scored positions is the real one.
    config = compose(stage, "stage.noise_epsilon=0.99999")
    item = build_input(config)
    (chunk,) = build_model_chunks(config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows)
    for weight in chunk.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    plan = PlanBuilder(config.model, AttentionBackend.cpu, torch.float32, torch.device("cpu")).build(
        item.layout, item.doubled
    )
    in_place: Any = {torch.ops.aten.addmm_: count_in_place}  # the head's gradients; torch counts addmm alone
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss, _ = chunk(item.tokens, plan, weigh(item.scored, item.counts, config.stage))
        loss.backward()
    work = count_work(config)
    assert work.flops.layers + work.flops.head == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (work.positions, work.attended_pairs) == (item.counts.positions, item.counts.attended_pairs)


def count_in_place(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Count the FLOPs of total += left @ right from shapes."""
    return addmm_flop(total, left, right)


def build_input(config: RunConfig) -> ObjectiveInput:
    """Build one sequence with every token scored and, in the joint stage, masked."""
    from data_pipeline.noise import NoisyBatch

    layout = build_regular_layout(config.data.sequence_length, config.stage.block_size)
    tokens = torch.randint(config.model.vocab_size, layout.position_ids.shape)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, layout, everywhere, torch.zeros(1))
    noisy = NoisyBatch(batch, tokens, everywhere, torch.ones_like(tokens, dtype=torch.float32))
    return apply_objective(noisy, config.stage.objective)


def test_attention_flops_are_those_of_plain_matmuls() -> None:
    config = compose("ar", "data.sequence_length=1", "stage.block_size=1")
    model, length = config.model, 24
    shape = (model.num_attention_heads, length, model.head_dim)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value).sum().backward()
    per_pair = count_work(config).flops.attention  # one token: one pair
    assert length * length * per_pair == counter.get_total_flops() * model.num_layers


def test_a_joint_token_costs_two_positions_and_half_another_head() -> None:
    ar, joint = (count_work(compose(stage)).flops for stage in ("ar", "joint"))
    assert joint.layers == 2 * ar.layers
    assert joint.head == pytest.approx(1.5 * ar.head, rel=0.01)
