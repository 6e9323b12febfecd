"""Run megatron-core's forward/backward schedule over the microbatches of a global batch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pretrain.objective.losses import NUM_SUMS, compute_loss_sums
from pretrain.step.microbatches import Microbatch, PreparedStep
from pretrain.step.pipeline import build_pipeline_options


def run_schedule(model: list[Any], step: PreparedStep, forward_only: bool) -> Tensor:
    """Run forward (and backward) over all microbatches; return the loss sums [NUM_SUMS] of the whole global batch.

    Gradients are left in the gradient buffers, already reduced. `model`: this rank's (wrapped) chunks.
    """
    iterators = [iter(step.microbatches) for _ in model]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(step.microbatches),
        seq_length=0,  # unused: every microbatch has its own (pretrain/step/pipeline.py)
        micro_batch_size=len(step.microbatches[0].tokens),
        forward_only=forward_only,
        **build_pipeline_options(model, [microbatch.tokens for microbatch in step.microbatches]),
    )
    return _sum_over_ranks(outputs, step.microbatches[0].tokens.device)


def _forward_step(iterator: Iterator[Microbatch], model: Any) -> tuple[Any, Callable[..., Any]]:
    microbatch = next(iterator)
    output = model(microbatch.tokens, microbatch.plan, microbatch.scored, microbatch.images)

    def loss_function(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, cross_entropy = output
        sums = compute_loss_sums(loss, cross_entropy, microbatch.scored)
        # The token count in the middle is megatron-core's own denominator; ours is in the weights already.
        return loss, torch.ones((), dtype=torch.int), {"sums": sums}

    return output, loss_function


def _sum_over_ranks(outputs: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """Return the sum over pipeline stages (only the last has outputs), data- and context-parallel ranks, on all."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    for output in outputs:
        sums += output["sums"]
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return sums
