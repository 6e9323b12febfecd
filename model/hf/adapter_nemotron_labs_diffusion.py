"""Switching a PEFT draft adapter on for drafts and off for everything else.

A draft adapter (`linear_spec_lora/`) changes only `self_attn.o_proj`. An adapter that also changes other projections is
taken for a fine-tuned model: it belongs to verifier and drafter alike and stays on throughout.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def find_draft_adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT layers of an enabled draft adapter attached to `model`; empty when there is none.

    Raises:
        ValueError: the adapter is merged into the weights, so that verification could not run without it.
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
    return [layer for layer in layers.values() if not layer.disable_adapters]


class DraftAdapter:
    """The draft adapter of a model, if any; does nothing without one. The layers are looked up once."""

    def __init__(self, model: nn.Module):
        self._layers = find_draft_adapter_layers(model)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the body without the adapter."""
        with self._switched(disabled=True):
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the body (inside `suspended`) with the adapter."""
        with self._switched(disabled=False):
            yield

    @contextmanager
    def _switched(self, disabled: bool) -> Iterator[None]:
        # The flag that PEFT's own context manager sets, without its walk over all modules (80x slower per use).
        before = [layer._disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = disabled
            yield
        finally:
            for layer, flag in zip(self._layers, before, strict=True):
                layer._disable_adapters = flag
