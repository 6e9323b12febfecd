"""What autograd keeps for the backward, counted: in tensors of [2L, hidden size], which is what a layer's input takes.

On a CPU the recipe is split into forward and backward by the partitioner that torch.compile has on CUDA, without code
generation. The recipe attends causally here: any fused attention keeps query, key, value, output and log-sum-exp.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.bench.gpu.meter import attempt
from tests.bench.gpu.recipe import Changes, Recipe, _run_layer, _score_whole
from tests.bench.gpu.steps import RECIPE, Workbench
from tests.bench.joint.sides import OURS

PARTITIONER = "aot_eager_decomp_partition"


def measure_kept(bench: Workbench, length: int) -> dict[str, Any]:
    """By side: {"layer", of each; "head"} or {"error"}. The final norm is the layers' in ours, the head's elsewhere."""
    model, results = bench.settings.model, {}
    for name, build in ((RECIPE, _build_recipe), (OURS, _build_ours)):
        counted: dict[str, float] = {}

        def count(build: Any = build, counted: dict[str, float] = counted) -> None:
            layers, head, hidden = build(bench, length)
            kept = [count_kept_bytes(lambda: layers(hidden), [*bench.known(), hidden])]
            output = layers(hidden).detach().requires_grad_()
            kept.append(count_kept_bytes(lambda: head(output), [*bench.known(), output]))
            unit = hidden.numel() * hidden.element_size()
            counted.update(layer=kept[0] / model.num_layers / unit, head=kept[1] / unit)

        error = attempt(bench.meter, count)
        results[name] = counted if error is None else {"error": error}
    return results


def count_kept_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Of storages that the graph of `forward` keeps, those of `known` left out. The first call is to compile."""
    forward()
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}  # as tensors, so that none is given back while counting

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _output = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _build_recipe(bench: Workbench, length: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    step = Recipe(bench.build_side(length), bench.settings.case(length), Changes())
    step.mask = None
    if not bench.meter.is_cuda:
        step.run_layer = torch.compile(_run_layer, dynamic=False, backend=PARTITIONER)
        step.score_whole = torch.compile(_score_whole, dynamic=False, backend=PARTITIONER)

    def layers(x: Tensor) -> Tensor:
        for layer in step.layers:
            x = step.run_layer(layer, x, step.rotation, step.mask)
        return x

    return layers, step.score, step.embed().detach().requires_grad_()


def _build_ours(bench: Workbench, length: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    side = bench.build_side(length)
    module: Any = side.module
    (microbatch,) = side.step.microbatches
    hidden = module.embedding(microbatch.tokens, position_ids=None).detach().requires_grad_()
    plan = module.narrow(microbatch.plan, microbatch.scored, microbatch.tokens.numel())

    def layers(x: Tensor) -> Tensor:
        return module.decoder(x, attention_mask=None, attention_bias=plan)

    return layers, lambda x: module.score(x, microbatch.scored, plan)[0], hidden
