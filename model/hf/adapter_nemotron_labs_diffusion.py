"""Applying a PEFT draft adapter to the rows that draft, and to no others.

A draft adapter (`linear_spec_lora/`) changes only `self_attn.o_proj`. Which rows of a forward draft is an argument, so
that drafted and verified tokens can share one. An adapter that also changes other projections is taken for a fine-tuned
model: it belongs to verifier and drafter alike and stays on throughout.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NO_ROWS, ALL_ROWS = slice(0, 0), slice(None)


def find_draft_adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT layers of an enabled draft adapter attached to `model`; empty when there is none.

    Raises:
        ValueError: the adapter is merged into the weights, so that verification could not run without it, or it is no
            plain LoRA.
    """
    # An attached adapter implies that peft is loaded. Not imported here: it is no dependency of a checkpoint, and
    # transformers demands every package that a shipped file names in an import.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, tuners.BaseTunerLayer)}
    if not all(name.endswith("self_attn.o_proj") for name in layers):
        return []
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the draft adapter is merged into o_proj, but verification must run without it: unmerge it")
    enabled = [layer for layer in layers.values() if not layer.disable_adapters]
    if any(getattr(layer, "lora_variant", None) or not hasattr(layer, "lora_A") for layer in enabled):
        raise ValueError("the draft adapter is no plain LoRA (it is DoRA or another kind): train a plain one")
    return enabled


def project_output(o_proj: Any, attended: Tensor, draft_rows: slice | None) -> Tensor:
    """o_proj of attended [B, N, width] -> [B, N, hidden], with its adapter on draft_rows of N only.

    draft_rows: None leaves it to PEFT (all rows while adapters are enabled); else the model has a draft adapter.
    """
    if draft_rows is None:
        return o_proj(attended)
    output = o_proj.base_layer(attended)
    drafted = attended[:, draft_rows]
    if drafted.shape[1]:
        output[:, draft_rows] += _compute_update(o_proj, drafted).to(output.dtype)
    return output


def _compute_update(o_proj: Any, rows: Tensor) -> Tensor:
    """What PEFT adds to the base layer's output, summed over active adapters."""
    update: Any = 0
    for name in o_proj.active_adapters:
        down, up = o_proj.lora_A[name], o_proj.lora_B[name]
        inputs = o_proj.lora_dropout[name](rows.to(down.weight.dtype))
        update = update + up(down(inputs)) * o_proj.scaling[name]
    return update


class DraftAdapter:
    """The draft adapter of a model, if any; looked up once."""

    def __init__(self, model: nn.Module):
        self._layers = find_draft_adapter_layers(model)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._layers)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the body as if there were none; does nothing without one."""
        # The flag that PEFT's own context manager sets, without its walk over all modules (80x slower per use).
        before = [layer._disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, flag in zip(self._layers, before, strict=True):
                layer._disable_adapters = flag
