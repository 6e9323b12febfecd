"""Time and memory of head and loss alone: gradients formed in the forward, or logits recomputed in the backward."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from conf.schema import Objective
from model.megatron.head import ScoredPositions, score_rows
from tests.bench.gpu.meter import measure
from tests.bench.gpu.steps import Workbench
from tests.bench.joint.cases import SEED, build_step

CHUNKS = (512, 1024, 4096)
FORMED, RECOMPUTED, COMPILED = "formed in the forward", "recomputed", "recomputed, compiled"
WHOLE = "whole logits, compiled"
RECOMPUTED_CHUNK = 1024


def list_ways() -> list[str]:
    """List the names of all ways."""
    formed = [f"{FORMED}, chunks of {size}" for size in CHUNKS]
    return [*formed, *(f"{way}, chunks of {RECOMPUTED_CHUNK}" for way in (RECOMPUTED, COMPILED)), WHOLE]


def measure_head(bench: Workbench, length: int) -> dict[str, Any]:
    """Measure every way on random hidden states of the joint step's scored positions."""
    case = bench.settings.case(length)
    (microbatch,) = build_step(case, Objective.joint).microbatches
    weight: Any = bench.side.module.output_layer.weight
    num_scored = len(microbatch.scored.positions)
    generator = torch.Generator(device=case.device).manual_seed(SEED)
    shape = num_scored, case.model.hidden_size
    hidden = torch.randn(shape, generator=generator, device=case.device, dtype=weight.dtype).requires_grad_()
    ways = build_ways(hidden, weight, microbatch.scored, bench.meter.is_cuda)
    return measure(bench.meter, ways, bench.settings.rounds, [*bench.known(), hidden])


def build_ways(
    hidden: Tensor, weight: Tensor, scored: ScoredPositions, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Build each way's forward and backward, which returns the loss.

    hidden [N, H], weight [V, H]. compiled: compile the ways whose names say so.
    """
    group: Any = parallel_state.get_tensor_model_parallel_group()
    plain: Callable[..., Tensor] = torch.compile(_weighted_loss, dynamic=False) if compiled else _weighted_loss

    def formed(loss_chunk_rows: int) -> Tensor:
        return score_rows(hidden, weight, scored.targets, scored.weights, loss_chunk_rows, group)[0]

    def recomputed(loss_of: Callable[..., Tensor]) -> Tensor:
        parts = (tensor.split(RECOMPUTED_CHUNK) for tensor in (hidden, scored.targets, scored.weights))
        losses = [
            checkpoint(loss_of, chunk, weight, *others, use_reentrant=False, preserve_rng_state=False)
            for chunk, *others in zip(*parts, strict=True)
        ]
        return torch.stack(losses).sum()  # type: ignore[arg-type]

    def whole() -> Tensor:
        return plain(hidden, weight, scored.targets, scored.weights)

    losses: list[Callable[[], Tensor]] = [lambda size=size: formed(size) for size in CHUNKS]
    losses += [lambda: recomputed(_weighted_loss), lambda: recomputed(plain), whole]
    return {name: _both_ways(hidden, loss) for name, loss in zip(list_ways(), losses, strict=True)}


def _both_ways(hidden: Tensor, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        hidden.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return run


def _weighted_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (cross_entropy(exact, targets, reduction="none") * weights).sum()
