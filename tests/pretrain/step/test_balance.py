"""What the deal of a step counts for a microbatch is what its forward computes; the deal spreads it evenly."""

from typing import Any

import pytest
import torch

from conf.composition.compose import compose_size
from conf.schema import AttentionBackend, Objective, RunConfig
from data_pipeline.batch import stack_batches
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Outline, lay_out
from data_pipeline.work import count_sequence_work
from model.attention.context import ContextShard
from model.attention.plan import PlanBuilder
from pretrain.costs import count_step_flops
from pretrain.step.balance import StepBalance, compute_microbatch_flops
from pretrain.step.microbatches import MicrobatchBuilder
from tests.bench.data.dealing import DrawnBlend, build_config
from tests.data_pipeline.test_work import draw_segments

NOISE = NoiseSource(3, "sft", "train", 1e-3)
LENGTH = 256


def build(stage: str, block_size: int, context_parallel: int) -> RunConfig:
    sizes = [f"data.sequence_length={LENGTH}", f"stage.block_size={block_size}", "model=tiny", "train.tokens=1e6"]
    return compose_size([f"stage={stage}", *sizes, f"parallel.context_parallel={context_parallel}"])


@pytest.mark.parametrize("context_parallel", [1, 2])
@pytest.mark.parametrize("stage", ["ar", "sft"])
def test_the_work_of_a_microbatch_is_what_its_forward_computes(stage: str, context_parallel: int) -> None:
    for seed in range(12):
        block_size = (4, 16, 32)[seed % 3]
        config = build(stage, block_size, context_parallel)
        is_joint = config.stage.objective is Objective.joint
        form = SequenceForm(LENGTH, block_size, block_size if is_joint else 1)
        drawn = [draw_segments(3 * seed + number, form) for number in range(3)]
        outlines = [Outline(item.lengths, item.documents, item.is_prompt) for item in drawn]
        noise = NOISE if is_joint else None
        work = [count_sequence_work(outline, form, noise, index) for index, outline in enumerate(outlines)]
        batch = stack_batches([lay_out(item, form, 2, index) for index, item in enumerate(drawn)])
        shard = ContextShard(0, context_parallel, None, block_size)
        given = add_noise(batch, NOISE, 2) if is_joint else batch
        plans = PlanBuilder(config.model, AttentionBackend.cpu, torch.float32, torch.device("cpu"), shard)
        _, counts = MicrobatchBuilder(config.stage, NOISE, 2, plans, config.noisy_lengths)._build(given)
        units = (counts.computed_positions, counts.attended_pairs, counts.clean + counts.masked)
        assert compute_microbatch_flops(config, work) == sum(count_step_flops(config.model, *units))
        assert add_noise(batch, NOISE, 2).is_live.any()


@pytest.mark.parametrize(("ranks", "size", "microbatches"), [(8, 1, 4), (8, 4, 1), (4, 2, 4)])
def test_chats_of_different_shares_of_prompts_are_dealt_within_a_tenth_of_the_mean(
    ranks: int, size: int, microbatches: int
) -> None:
    blend: Any = DrawnBlend("packed chats")
    config = build_config(ranks, size, microbatches)
    balance = StepBalance(config, blend, NoiseSource(1, "joint", "train", 1e-3), ranks)
    for step in range(3):
        dealt = balance(step * config.train.global_batch_size)
        assert dealt.rank_imbalance is not None and dealt.undealt_rank_imbalance is not None
        assert dealt.rank_imbalance < min(1.1, dealt.undealt_rank_imbalance)
        again = StepBalance(config, blend, balance.noise, ranks)
        assert again(step * config.train.global_batch_size) == dealt
