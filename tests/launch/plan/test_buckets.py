"""Buckets are cut where megatron-core cuts them."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from conf.composition.compose import compose_size
from launch.plan.buckets import find_buckets, list_parameters
from launch.plan.rank_shape import build_rank_shape

CASES = {
    "recipe": (["experiment=nld_8b_joint"], 256),
    "small buckets": (["experiment=nld_8b_joint", "parallel.bucket_parameters=1000000"], 96),
    "one layer and the vocabulary": (["experiment=nld_3b_ar", "model.num_layers=1"], 24),
    "without overlap": (
        ["experiment=nld_3b_ar", "parallel.overlap_grad_reduce=false", "parallel.overlap_param_gather=false"],
        8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_and_padding_are_megatron_cores(name: str) -> None:
    overrides, num_gpus = CASES[name]
    shape = build_rank_shape(compose_size([*overrides, f"train.global_batch_size={num_gpus}"]), num_gpus)
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in list_parameters(shape, 0, 0)]
    size = shape.parallel.bucket_parameters or max(40_000_000, 1_000_000 * shape.data_parallel)
    layout = DistributedOptimizer._compute_per_buffer_param_layout(
        parameters,
        size if shape.parallel.overlap_grad_reduce else None,
        shape.data_ranks,
        SimpleNamespace(pad_buckets_for_high_nccl_busbw=False),
    )
    assert find_buckets(shape, 0) == [end - start for start, end in layout.bucket_indices]


def test_later_stages_and_chunks_have_one_bucket() -> None:
    overrides = ["experiment=nld_14b_joint", "parallel.pipeline_parallel=4", "parallel.virtual_pipeline_parallel=2"]
    shape = build_rank_shape(compose_size(overrides), 256)
    assert len(find_buckets(shape, 0)) > 2
    assert all(len(find_buckets(shape, pp_rank)) == 2 for pp_rank in (1, 2, 3))


def test_parameters_of_all_stages_are_those_of_the_model() -> None:
    config = compose_size(
        ["experiment=nld_14b_joint", "parallel.tensor_parallel=1", "parallel.sequence_parallel=false"]
    )
    shape = build_rank_shape(config, 256)
    assert sum(list_parameters(shape, 0, 0)) == config.model.num_parameters
