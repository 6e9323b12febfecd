"""Count what autograd saves for the backward, in tensors of [2L, hidden size]: a layer's input takes one.

On a CPU the recipe is split into forward and backward by the partitioner that torch.compile has on CUDA, without code
generation. The recipe attends causally here: any fused attention saves query, key, value, output and log-sum-exp.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from conf.schema import Recompute
from tests.bench.gpu.meter import attempt
from tests.bench.gpu.recipe import Changes, Recipe, _run_layer, _score_whole
from tests.bench.gpu.steps import AGAIN, RECIPE, Workbench, build_workbench
from tests.bench.joint.sides import OURS

PARTITIONER = "aot_eager_decomp_partition"


def measure_saved(bench: Workbench, length: int) -> dict[str, Any]:
    """Return by side {"layer": of each, "head"} or {"error"}.

    The final norm belongs to the layers in ours, to the head elsewhere.
    """
    results: dict[str, Any] = {}
    for name in (RECIPE, OURS, AGAIN):
        counted: dict[str, float] = {}

        def count(name: str = name, counted: dict[str, float] = counted) -> None:
            its = build_workbench(bench.settings, recompute=Recompute.elementwise) if name == AGAIN else bench
            counted.update(_measure_side(its, length, name == RECIPE))

        error = attempt(bench.meter, count)
        results[name] = counted if error is None else {"error": error}
    return results


def _measure_side(bench: Workbench, length: int, is_recipe: bool) -> dict[str, float]:
    layers, head, hidden = (_build_recipe if is_recipe else _build_ours)(bench, length)
    # What is compiled cannot be counted by live tensors on a CPU; what is recomputed cannot by what is saved.
    count = count_saved_bytes if is_recipe and not bench.meter.is_cuda else bench.meter.saved_bytes
    output = layers(hidden).detach().requires_grad_()
    head(output)
    by_layers = count(lambda: layers(hidden), [*bench.known(), hidden])
    by_head = count(lambda: head(output), [*bench.known(), output])
    unit = hidden.numel() * hidden.element_size()
    return {"layer": by_layers / bench.settings.model.num_layers / unit, "head": by_head / unit}


def count_saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Return the bytes of storages that the graph of `forward` saves, those of `known` left out."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, Tensor] = {}  # as tensors, so that none is given back while counting

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages:
            saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        _output = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


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
