"""One layer's attention on the ranks of a context-parallel group, against the dense mask, and its bytes; then runs.

`torchrun ... -m tests.helpers.context_jobs JOBS.json FOLDER`: JOBS.json holds "runs" (a list of overrides each) and
"attention" {ranks of the group: {name: {"sequences", "length", "block_size", "doubled", "recompute", "dtype", and if
need be "min_chunk_length"}}}, sequences as of tests.helpers.packed; of these every rank writes
FOLDER/<size>_<name>_rank<r>.json {"output", "gradients" (largest differences, relative where values are above 1),
"sent" {collective: bytes of its messages}}.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from conf.composition.compose import compose_run_config, compose_size
from conf.schema import AttentionBackend, RunConfig
from conf.system.entry import quiet_libraries
from data_pipeline.packing.form import SequenceForm
from model.attention.context import MIN_CHUNK_LENGTH, find_context_shard
from model.attention.plan import PlanBuilder
from model.attention.visibility import compute_dense_mask
from model.megatron import cpu
from pretrain.assemble import run_training
from pretrain.run.model_parallel import distributed_session
from tests.helpers.live_bytes import SentBytes
from tests.helpers.packed import pack_chats


def main() -> None:
    """Run the jobs of argv[1] in order."""
    quiet_libraries()
    cpu.install()
    dist.init_process_group("gloo")
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for size, jobs in given["attention"].items():
        config = compose_size(["model=tiny", "runtime=cpu", "train.tokens=1e6", f"parallel.context_parallel={size}"])
        with distributed_session(config.parallel, config.runtime, seed=1):
            for name, job in jobs.items():
                path = Path(sys.argv[2]) / f"{size}_{name}_rank{dist.get_rank()}.json"
                path.write_text(json.dumps(measure(config, **job)), encoding="utf-8")
    for overrides in given["runs"]:
        run_training(compose_run_config(overrides))
    dist.destroy_process_group()


def measure(
    config: RunConfig,
    sequences: list[list[list[int]]],
    length: int,
    block_size: int,
    doubled: bool,
    recompute: bool,
    dtype: str,
    min_chunk_length: int = MIN_CHUNK_LENGTH,
) -> dict[str, Any]:
    """Compare forward and backward of this rank's positions with those positions of the whole sequence."""
    batch = pack_chats(sequences, SequenceForm(length, block_size, block_size if doubled else 1))
    shard = replace(find_context_shard(block_size), min_chunk_length=min_chunk_length)
    heads = draw_heads(config, len(sequences), length * (2 if doubled else 1))
    weight = torch.linspace(-1, 1, heads[0].numel()).view_as(heads[0])
    mask = compute_dense_mask(batch.layout, doubled)[:, None]
    expected = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), heads)

    positions = shard.find_positions(length, doubled)
    local = [tensor.detach()[:, :, positions].to(getattr(torch, dtype)).requires_grad_() for tensor in heads]
    where = (AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    attend = PlanBuilder(config.model, *where, shard).build(batch.layout, doubled).attend
    with SentBytes() as sent:
        attended: Any = checkpoint(attend, *local, use_reentrant=False) if recompute else attend(*local)
        gradients = torch.autograd.grad((attended * weight[:, :, positions]).sum(), local)
    parts = [gradient[:, :, positions] for gradient in expected_gradients]
    return {
        "output": largest_difference([attended], [expected[:, :, positions]]),
        "gradients": largest_difference(gradients, parts),
        "sent": sent.by_collective,
    }


def draw_heads(config: RunConfig, batch: int, num_positions: int) -> list[Tensor]:
    """Draw query, key and value with gradients; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    groups = config.model.num_key_value_heads
    counts = (config.model.num_attention_heads, groups, groups)
    shape = (num_positions, config.model.head_dim)
    return [torch.randn(batch, count, *shape, generator=generator).requires_grad_() for count in counts]


def largest_difference(found: Any, expected: Any) -> float:
    """Return the largest difference over all tensors, each relative to its largest value where that is above 1."""
    return max(
        ((mine.float() - its).abs().max() / its.abs().max().clamp(min=1)).item()
        for mine, its in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    main()
