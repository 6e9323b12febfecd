"""The model's last layer goes on with scored rows alone once attention is done.

Of a row without loss the last layer needs keys and values, for others see them; its output projection, MLP and final
norm would be for nothing. In the joint stage a quarter of the rows have no loss, in SFT most.
Not under sequence parallelism: there the residual stream is split by rows, and the kept ones would have to be dealt
anew.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

from model.attention.plan import AttentionPlan, CoreAttention

MOST_KEPT = 0.9  # of all rows: beyond, picking them costs what leaving out the others saves
MULTIPLE, FP8_MULTIPLE = 16, 128  # of rows, for whole tiles; products in 8 bits need them


def keep_scored_rows(plan: AttentionPlan, rows: Tensor, num_rows: int, multiple: int = MULTIPLE) -> AttentionPlan:
    """The plan by which the last layer keeps scored `rows` [N] of num_rows, if that pays.

    Row 0 fills up to a multiple, at least one; what becomes of it is not read.
    """
    kept = max(1, -(-len(rows) // multiple)) * multiple
    if kept > MOST_KEPT * num_rows:
        return plan
    return replace(plan, last_positions=torch.cat([rows, rows.new_zeros(kept - len(rows))]))


def make_last(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer, made that of the last one."""
    submodules: Any = layer.submodules
    attention = submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=LastCoreAttention))
    return replace(layer, module=LastLayer, submodules=replace(submodules, self_attention=attention))


class LastCoreAttention(CoreAttention):
    """Attention of all rows, of which the kept ones come out."""

    def forward(self, *inputs: Any, attention_bias: AttentionPlan, **options: Any) -> Tensor:
        """As CoreAttention's -> [N, 1, H * D] where the plan keeps N rows."""
        return attention_bias.take_last_positions(super().forward(*inputs, attention_bias=attention_bias, **options))


class LastLayer(TransformerLayer):
    """megatron-core's layer, whose residual stream narrows to the kept rows with its attention's output."""

    def _forward_attention(  # type: ignore[override]
        self, hidden_states: Tensor, *inputs: Any, attention_bias: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        """hidden_states [R, B, H] -> [R, B, H], or [N, 1, H] where the plan keeps N rows."""
        plan: AttentionPlan = attention_bias
        if plan.last_positions is None:
            return super()._forward_attention(hidden_states, *inputs, attention_bias=attention_bias, **options)
        assert not self.recompute_input_layernorm, "model/megatron/transformer_config.py asks for attention alone"
        normed = apply_module(self.input_layernorm)(hidden_states)
        attended, _ = self.self_attention(normed, attention_mask=None, attention_bias=attention_bias)
        return plan.take_last_positions(hidden_states) + attended, None
