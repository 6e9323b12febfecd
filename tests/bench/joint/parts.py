"""Our joint step and our AR step of the same tokens in two parts: layers, and head with loss."""

from collections.abc import Callable

import torch

from tests.bench.joint.cases import SEED
from tests.bench.joint.sides import Side


def build_parts(side: Side) -> dict[str, Callable[[], object]]:
    """Build "layers" and "head": each runs forward and backward; gradients of weights go to the trainer's buffers."""
    module, (microbatch,) = side.module, side.step.microbatches
    shape = (microbatch.tokens.shape[1], 1, module.config.hidden_size)
    generator = torch.Generator().manual_seed(SEED)
    hidden, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    hidden.requires_grad_()

    plan = module.narrow(microbatch.plan, microbatch.scored, microbatch.tokens.numel())
    output, grad = plan.take_last_positions(hidden.detach()).clone().requires_grad_(), plan.take_last_positions(grad)

    def layers() -> None:
        module.decoder(hidden, attention_mask=None, attention_bias=plan).backward(grad)

    def head() -> None:
        loss, _ = module.score(output, microbatch.scored, plan)
        loss.backward()

    return {"layers": layers, "head": head}
