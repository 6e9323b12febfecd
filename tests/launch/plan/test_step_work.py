"""FLOPs and attended pairs equal those of torch's counter, of the dense reference mask and of the trainer."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from conf.composition.compose import compose_size
from conf.schema import AttentionBackend, RunConfig, RuntimeConfig
from data_pipeline.batch import Batch, SequenceLayout
from data_pipeline.noise import NoiseSource, add_noise
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.layout_plan import plan_layout
from launch.plan.step_work import SequenceKind, count_work
from launch.simulate.stand_ins import RandomSequences
from model.attention.context import ContextShard
from model.attention.live import choose_positions
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout, compute_dense_mask
from model.megatron.build import build_model_chunks
from pretrain.costs import count_attended_pairs
from pretrain.objective.losses import weigh
from pretrain.run.model_parallel import distributed_session
from tests.helpers.objective import ObjectiveInput, apply_objective

SIZES = [(1, 1), (8, 4), (32, 8), (48, 48), (60, 1), (96, 24), (128, 32), (288, 48), (50, 16), (7, 32), (333, 32)]
TINY = ["model=tiny", "runtime=cpu", "precision=fp32", "train.tokens=1e6", "train.global_batch_size=1"]
EVERY_BLOCK_LIVE = "stage.noise_epsilon=0.99999"
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
    config = compose(stage, EVERY_BLOCK_LIVE)
    lengths = torch.tensor([48, 48, 32])
    documents = torch.repeat_interleave(torch.arange(3), lengths)[None]
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    blocks = torch.cumsum(positions % 32 == 0, dim=1) - 1
    packed = SequenceLayout(documents, blocks, positions, torch.zeros_like(documents, dtype=torch.bool))
    assert count_work(config, SequenceKind(48)).attended_pairs == int(
        compute_dense_mask(packed, stage == "joint").sum()
    )


def test_documents_that_see_each_other_are_one() -> None:
    config = compose("ar", "data.isolate_documents=false")
    assert count_work(config, SequenceKind(16)).attended_pairs == count_attended_pairs(128, 32, doubled=False)


@pytest.fixture
def single_process() -> Iterator[None]:
    config = compose("ar")
    with distributed_session(config.parallel, RuntimeConfig(), seed=1):
        yield


@pytest.mark.parametrize("stage", ["ar", "joint"])
def test_matmuls_with_weights_are_those_torch_counts_in_the_model(stage: str, single_process: None) -> None:
    # Fully masked, so that the expected number of scored positions is the real one.
    config = compose(stage, EVERY_BLOCK_LIVE)
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


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", [SequenceKind(), SequenceKind(64), SequenceKind(128, 0.5)])
def test_expected_positions_are_those_of_drawn_noise(kind: SequenceKind, size: int) -> None:
    batch = [f"train.micro_batch_size={size}", f"train.global_batch_size={size}", "data.sequence_length=512"]
    config = compose("joint", "stage.block_size=8", *batch)
    work, noise = count_work(config, kind), NoiseSource(1, "joint", "train", config.stage.noise_epsilon)
    useful, lengths = [], []
    for number in range(400 // size):
        drawn = RandomSequences(config, kind).build_batch(range(number * size, (number + 1) * size))
        noisy = add_noise(drawn, noise, 0)
        useful.append(config.tokens_per_step + int(noisy.is_live.sum()))
        positions = choose_positions(drawn.block_ids, noisy.is_live, ContextShard(), config.noisy_lengths)
        lengths.append(positions.noisy.shape[1])
    assert work.positions == pytest.approx(mean(useful), rel=0.02)
    # The plan gives packed documents the mean of their noise; where that is near a length, some need the next one.
    assert work.noisy_length == pytest.approx(mean(lengths), rel=0.03 if kind.document_tokens is None else 0.2)
    assert work.computed_positions == size * (512 + work.noisy_length)


def test_seconds_count_what_is_computed_and_mfu_what_is_useful() -> None:
    plan = plan_layout(compose_size(["experiment=nld_8b_sft"]), 256, HardwareProfile(), SequenceKind(1000, 0.4))
    work = plan.work
    assert work.positions < work.computed_positions < 1.6 * work.tokens
    assert work.computed_flops.layers == pytest.approx(work.flops.layers * work.computed_positions / work.positions)
    seconds = 256 * plan.hardware.peak_flops
    assert plan.time.compute * plan.hardware.mfu == pytest.approx(sum(work.computed_flops) / seconds)
    assert plan.mfu == pytest.approx(sum(work.flops) / (plan.time.total * seconds))
    whole = plan_layout(compose_size(["experiment=nld_8b_sft"]), 256, HardwareProfile())
    assert plan.fullest == whole.fullest, "memory is that of the longest forwards"
    assert plan.time.total < 0.8 * whole.time.total


def test_a_joint_token_costs_two_positions_and_half_another_head() -> None:
    ar, joint = (count_work(compose(stage)).flops for stage in ("ar", "joint"))
    assert joint.layers == pytest.approx((2 - (1 - 1e-3) ** 32 / 33) * ar.layers, rel=0.005)
    assert joint.head == pytest.approx(1.5 * ar.head, rel=0.01)
