"""Applying a PEFT draft adapter to the rows that draft, and to no others.

A draft adapter (`linear_spec_lora/`) changes only `self_attn.o_proj`. Which rows of a forward draft is an argument, so
that drafted and verified tokens can share one. An adapter that also changes other projections is taken for a fine-tuned
model: it belongs to verifier and drafter alike and stays on throughout, also beside a draft adapter.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

NO_ROWS, ALL_ROWS = slice(0, 0), slice(None)


@dataclass(frozen=True)
class DraftRows:
    """rows: of the N new tokens, those that draft. names: adapters that apply to them alone."""

    names: frozenset[str]
    rows: slice


def _find_adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of any PEFT adapter by name; empty without one."""
    # An attached adapter implies that peft is loaded. Not imported here: it is no dependency of a checkpoint, and
    # transformers demands every package that a shipped file names in an import.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, tuners.BaseTunerLayer)}


def _is_active(layer: Any, adapter: str) -> bool:
    """Whether an adapter changes what a layer computes."""
    return not layer.disable_adapters and adapter in layer.active_adapters and adapter in layer.lora_A


def find_draft_adapters(model: nn.Module) -> tuple[frozenset[str], list[Any]]:
    """Names of the enabled draft adapters attached to `model` and the layers they change; both empty without one.

    Raises:
        ValueError: one is merged into the weights, so that verification could not run without it, or is no plain LoRA.
    """
    layers = _find_adapted_layers(model)
    if any(not hasattr(layer, "lora_A") for layer in layers.values()):
        return frozenset(), []  # adapters of other kinds: a fine-tuned model
    places = [(name, adapter) for name, layer in layers.items() for adapter in layer.lora_A]
    elsewhere = {adapter for name, adapter in places if not name.endswith("self_attn.o_proj")}
    drafting = {adapter for _, adapter in places} - elsewhere
    changed = [layer for layer in layers.values() if any(_is_active(layer, adapter) for adapter in drafting)]
    if any(drafting & set(layer.merged_adapters) for layer in layers.values()):
        raise ValueError("the draft adapter is merged into o_proj, but verification must run without it: unmerge it")
    if any(drafting & set(getattr(layer, "lora_variant", ())) for layer in changed):
        raise ValueError("the draft adapter is no plain LoRA (it is DoRA or another kind): train a plain one")
    return frozenset(drafting) if changed else frozenset(), changed


def project_output(o_proj: Any, attended: Tensor, drafting: DraftRows | None) -> Tensor:
    """o_proj of attended [B, N, width] -> [B, N, hidden], with draft adapters on the drafting rows of N only.

    drafting: None leaves it to PEFT (all rows while adapters are enabled).
    """
    if drafting is None or not hasattr(o_proj, "lora_A"):
        return o_proj(attended)
    output = o_proj.base_layer(attended)
    for name in o_proj.active_adapters:
        rows = drafting.rows if name in drafting.names else ALL_ROWS
        adapted = attended[:, rows]
        if adapted.shape[1] and _is_active(o_proj, name) and name not in o_proj.merged_adapters:
            output[:, rows] += _compute_update(o_proj, name, adapted).to(output.dtype)
    return output


def _compute_update(o_proj: Any, name: str, rows: Tensor) -> Tensor:
    """What PEFT adds to the base layer's output for one adapter."""
    down, up = o_proj.lora_A[name], o_proj.lora_B[name]
    inputs = o_proj.lora_dropout[name](rows.to(down.weight.dtype))
    return up(down(inputs)) * o_proj.scaling[name]


class DraftAdapter:
    """The draft adapters of a model, if any; looked up once."""

    def __init__(self, model: nn.Module):
        self._names, self._layers = find_draft_adapters(model)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._layers)

    def on(self, rows: slice) -> DraftRows | None:
        """The adapters on `rows` alone, for a forward; None without one."""
        return DraftRows(self._names, rows) if self._layers else None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the body as if there were none; does nothing without one."""
        # The list that PEFT's own methods set, without their walk over all modules (80x slower per use).
        before = [layer._active_adapter for layer in self._layers]
        try:
            for layer in self._layers:
                layer._active_adapter = [name for name in layer.active_adapters if name not in self._names]
            yield
        finally:
            for layer, names in zip(self._layers, before, strict=True):
                layer._active_adapter = names
