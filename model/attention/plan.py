"""Choose how attention is computed, once per forward, and hand it to every layer.

An AttentionPlan travels through megatron-core's `attention_bias` argument, which reaches every layer (and survives
activation recomputation) untouched; no layer holds a mode or a mask.
Shapes: B batch, S clean length, R positions of this rank, H query heads, G key heads, D head_dim.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from conf.schema import AttentionBackend, ModelConfig
from conf.system.errors import UserError
from data_pipeline.batch import SequenceLayout
from model.attention.context import WHOLE, ContextAttention, ContextShard
from model.attention.flex import build_flex_attention
from model.attention.grouped import build_grouped_attention
from model.attention.positions import ForwardPositions
from model.attention.rotation import Rotation, RotationBuilder, apply_rotation
from model.attention.tiled import TiledAttention, fits_tiles
from model.attention.visibility import find_regular_block_size, find_visible_keys

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)
REASONS = {
    AttentionBackend.flex: "device cuda; no other backend has been measured there, tests/bench/GPU.md",
    AttentionBackend.cpu: "device cpu, where FlexAttention has no backward",
}


@dataclass(frozen=True)
class AttentionPlan:
    """Holds what every layer's attention needs from a batch.

    rotation: of queries and keys by position id. attend: query, key, value [B, heads, R, D] -> [B, H, R, D].
    last_positions: [N], index into the flattened [R, B] positions of those that the last layer continues with after
    its attention; None: all.
    """

    rotation: Rotation
    attend: Attend
    last_positions: Tensor | None = None

    def take_last_positions(self, hidden: Tensor) -> Tensor:
        """Map hidden [R, B, width] to [N, 1, width]; return it unchanged where the last layer continues with all."""
        return hidden if self.last_positions is None else hidden.flatten(0, 1)[self.last_positions][:, None]


class CoreAttention(MegatronModule):
    """Rotates, scales and attends over the heads of this tensor-parallel rank, as called by megatron-core.

    It has no parameters.
    """

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
        """Map query [R, B, H, D], key and value [R, B, G, D] before rotation to [R, B, H * D]."""
        plan = attention_bias
        assert isinstance(plan, AttentionPlan), "the model passes an AttentionPlan as attention_bias"
        query = apply_rotation(query, plan.rotation, scale=True)
        key = apply_rotation(key, plan.rotation)
        attended = plan.attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        num_positions, batch = query.shape[:2]
        return attended.permute(2, 0, 1, 3).reshape(num_positions, batch, -1)


@dataclass
class PlanBuilder:
    """Turns layouts (given on the CPU) into plans on `device`; plans of regular layouts are cached.

    shard: which positions of every sequence this rank holds; layouts are those of whole sequences.
    """

    model: ModelConfig
    backend: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    shard: ContextShard = WHOLE
    _regular: dict[tuple[int, int, bool], AttentionPlan] = field(default_factory=dict, repr=False)
    _rotations: RotationBuilder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rotations = RotationBuilder(self.model.rope, self.model.head_dim)
        if self.backend is AttentionBackend.auto:
            self.backend = AttentionBackend.flex if self.device.type == "cuda" else AttentionBackend.cpu
            logger.info("attention backend: %s (%s)", self.backend.value, REASONS[self.backend])
        if self.backend is AttentionBackend.flex and self.device.type == "cpu":
            raise UserError(
                "runtime.attention_backend=flex has no backward pass on the CPU, and there is no CUDA device here: use "
                "runtime.attention_backend=cpu or auto."
            )
        if self.shard.size > 1:
            kind = "FlexAttention" if self.backend is AttentionBackend.flex else "groups under masks"
            logger.info("attention of %d context-parallel ranks: %s over gathered clean keys", self.shard.size, kind)

    def build(self, layout: SequenceLayout, doubled: bool) -> AttentionPlan:
        """Return the plan of a whole forward, over [noisy | clean] (doubled) or clean tokens laid out so."""
        return self.build_for(layout, self.shard.find_whole(layout.sequence_length, doubled))

    def build_for(self, layout: SequenceLayout, positions: ForwardPositions) -> AttentionPlan:
        """Return the plan of a forward over these positions of sequences laid out so."""
        layout, positions = layout.without_repeats(), positions.without_repeats()
        block_size = find_regular_block_size(layout) if positions.is_whole else None
        if block_size is None:
            return self._build(layout, positions, None)
        key = (layout.sequence_length, block_size, positions.has_noisy)
        if key not in self._regular:
            self._regular[key] = self._build(layout, positions, block_size)
        return self._regular[key]

    def _build(self, layout: SequenceLayout, positions: ForwardPositions, block_size: int | None) -> AttentionPlan:
        cuts = positions.has_noisy and positions.is_whole and self.shard.cuts_a_block(layout.block_ids)
        assert not cuts, "a context shard cuts a block"
        return AttentionPlan(self._rotate(layout, positions), self._choose(layout, positions, block_size))

    def _rotate(self, layout: SequenceLayout, positions: ForwardPositions) -> Rotation:
        # Asked on the CPU: a device would have to finish its work before it answers.
        scales_queries = int(layout.position_ids.max()) >= self.model.rope.original_max_position_embeddings
        position_ids = layout.position_ids.repeat(1, 2) if positions.has_noisy else layout.position_ids
        position_ids = positions.take(position_ids).to(self.device)
        return self._rotations.build(position_ids, self.dtype, scales_queries=scales_queries)

    def _choose(self, layout: SequenceLayout, positions: ForwardPositions, block_size: int | None) -> Attend:
        """Return the fastest way measured for the device and the layout (tests/bench/joint/attention.py)."""
        length, is_shared = layout.sequence_length, self.shard.size > 1
        on_cpu = self.backend is AttentionBackend.cpu and self.device.type == "cpu"
        if on_cpu and not is_shared and block_size is not None and fits_tiles(length, block_size):
            logger.info("attention of %d tokens in blocks of %d: tiled (one document)", length, block_size)
            return TiledAttention(length, block_size, positions.has_noisy)
        keys = find_visible_keys(layout, positions.has_noisy).take(positions).to(self.device)
        if self.backend is AttentionBackend.flex:
            attend: Attend = build_flex_attention(keys)
        else:
            attend = build_grouped_attention(keys, self.shard.find_chunk_length(length) if is_shared else None)
        return ContextAttention(self.shard, length // self.shard.size, attend) if is_shared else attend
