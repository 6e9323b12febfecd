"""What every layer's attention needs from a batch, computed once per forward and passed down as an argument."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conf.schema import AttentionBackend, ModelConfig
from conf.system.errors import UserError
from model.attention.blocks import BlockAttention, suits
from model.attention.context import WHOLE, ContextAttention, ContextShard
from model.attention.flex import build_flex_attention
from model.attention.layout import SequenceLayout
from model.attention.rotation import Rotation, compute_rotation
from model.attention.split import build_split_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)
REASONS = {
    AttentionBackend.flex: "device cuda; nothing else was measured there yet, tests/bench/GPU.md",
    AttentionBackend.split: "device cpu, where FlexAttention has no backward",
}


@dataclass(frozen=True)
class AttentionPlan:
    """rotation: of queries and keys by in-half position. attend: query, key, value [B, heads, R, D] -> [B, H, R, D].

    R: rows of this rank. kept: [N], index into the flattened [R, B] rows of those that the last layer goes on with;
    None: all.
    """

    rotation: Rotation
    attend: Attend
    kept: Tensor | None = None

    def take_kept(self, rows: Tensor) -> Tensor:
        """[R, B, width] -> [N, 1, width], or all as they are."""
        return rows if self.kept is None else rows.flatten(0, 1)[self.kept][:, None]


@dataclass
class PlanBuilder:
    """Turns layouts (given on the CPU) into plans on `device`. Regular layouts are planned once and kept.

    shard: which rows of every sequence this rank holds; layouts are those of whole sequences.
    """

    model: ModelConfig
    backend: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    shard: ContextShard = WHOLE
    _regular: dict[tuple[int, int, bool], AttentionPlan] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.backend is AttentionBackend.auto:
            self.backend = AttentionBackend.flex if self.device.type == "cuda" else AttentionBackend.split
            logger.info("attention backend: %s (%s)", self.backend.value, REASONS[self.backend])
        if self.backend is AttentionBackend.flex and self.device.type == "cpu":
            raise UserError(
                "runtime.attention_backend=flex has no backward pass on the CPU, and there is no CUDA device here: use "
                "runtime.attention_backend=split or auto."
            )
        if self.shard.size > 1:
            kind = "FlexAttention" if self.backend is AttentionBackend.flex else "groups under masks"
            logger.info("attention of %d context-parallel ranks: %s over gathered clean keys", self.shard.size, kind)

    def build(self, layout: SequenceLayout) -> AttentionPlan:
        """The plan of a layout; one of regular blocks in a single document comes from the cache."""
        layout = layout.without_repeats()
        block_size = _regular_block_size(layout)
        if block_size is None:
            return self._build(layout, None)
        key = (layout.sequence_length, block_size, layout.doubled)
        if key not in self._regular:
            self._regular[key] = self._build(layout, block_size)
        return self._regular[key]

    def _build(self, layout: SequenceLayout, block_size: int | None) -> AttentionPlan:
        rope = self.model.rope
        # Asked on the CPU: a device would have to finish its work before it answers.
        scales_queries = int(layout.position_ids.max()) >= rope.original_max_position_embeddings
        assert not layout.doubled or _ends_of_spans_end_blocks(layout, self.shard), "a context shard cuts a block"
        layout = layout.to(self.device)
        rows = self.shard.rows(layout.sequence_length, layout.doubled).to(self.device)
        positions = layout.row_positions()[:, rows]
        rotation = compute_rotation(positions, rope, self.model.head_dim, self.dtype, scales_queries=scales_queries)
        if self.shard.size == 1:
            return AttentionPlan(rotation, self._choose(layout, block_size))
        return AttentionPlan(rotation, self._share(layout))

    def _choose(self, layout: SequenceLayout, block_size: int | None) -> Attend:
        """The fastest that was measured for the device and the layout (tests/bench/joint/attention.py)."""
        if self.backend is AttentionBackend.flex:
            return build_flex_attention(layout)
        if block_size is None or self.device.type != "cpu" or not suits(layout.sequence_length, block_size):
            return build_split_attention(layout)
        logger.info(
            "attention of %d tokens in blocks of %d: segments merged by log-sum-exp (one document of whole blocks on "
            "the CPU; `make bench-joint` compares)",
            layout.sequence_length,
            block_size,
        )
        return BlockAttention(layout.sequence_length, block_size, layout.doubled)

    def _share(self, layout: SequenceLayout) -> Attend:
        """Attention of this context-parallel rank's rows."""
        build = build_flex_attention if self.backend is AttentionBackend.flex else build_split_attention
        local_length = layout.sequence_length // self.shard.size
        return ContextAttention(self.shard, local_length, build(layout, self.shard))


def build_regular_layout(sequence_length: int, block_size: int, doubled: bool) -> SequenceLayout:
    """One document per sequence and blocks of equal size; fields [1, S]."""
    positions = torch.arange(sequence_length)[None]
    no_block_padding = torch.zeros_like(positions, dtype=torch.bool)
    return SequenceLayout(torch.zeros_like(positions), positions // block_size, positions, no_block_padding, doubled)


def _ends_of_spans_end_blocks(layout: SequenceLayout, shard: ContextShard) -> bool:
    starts = torch.tensor([span.start for span in shard.spans(layout.sequence_length) if span.start], dtype=torch.int64)
    return bool((layout.block_ids[:, starts] != layout.block_ids[:, starts - 1]).all())


def _regular_block_size(layout: SequenceLayout) -> int | None:
    block_size = int((layout.block_ids[0] == 0).sum())
    if len(layout.position_ids) > 1 or block_size == 0:
        return None
    regular = build_regular_layout(layout.sequence_length, block_size, layout.doubled)
    pairs = zip(layout.fields(), regular.fields(), strict=True)
    return block_size if all(torch.equal(mine, its) for mine, its in pairs) else None
