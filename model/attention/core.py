"""The core attention module megatron-core's SelfAttention calls: rotates, scales, attends.

It takes the batch's AttentionPlan through megatron-core's `attention_bias` argument, which reaches every layer (and
survives activation recomputation) untouched; no layer holds a mode or a mask.
"""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from model.attention.plan import AttentionPlan
from model.attention.rotation import apply_rotation


class CoreAttention(MegatronModule):
    """Attention without parameters over the heads of this tensor-parallel rank."""

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        attn_mask_type: Any = None,
        attention_bias: AttentionPlan | None = None,
        packed_seq_params: None = None,
    ) -> Tensor:
        """query [R, B, H, D], key and value [R, B, G, D] before rotation -> [R, B, H * D]."""
        plan = attention_bias
        assert isinstance(plan, AttentionPlan), "the model passes an AttentionPlan as attention_bias"
        query = apply_rotation(query, plan.rotation, scale=True)
        key = apply_rotation(key, plan.rotation)
        attended = plan.attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        rows, batch = query.shape[:2]
        return attended.permute(2, 0, 1, 3).reshape(rows, batch, -1)
