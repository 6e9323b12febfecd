"""Cases of what is computed element by element in training: rotation in all its forms, and SwiGLU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import RopeConfig
from model.attention.rotation import RotationBuilder, apply_rotation
from model.megatron.operators import CompiledSwiGLU
from tests.kernels.case import Draw, Tensors, differentiate

HEAD_DIM = 128
ROPE = RopeConfig(original_max_position_embeddings=64)  # so that positions of short sequences scale queries


@dataclass(frozen=True)
class RotationCase:
    """Rotates queries, or keys as they lie among queries and values; forward and backward.

    num_layouts: 1, or as many as sequences: position ids of one sequence, or of each. is_scaled: queries reach
    original_max_position_embeddings.
    """

    name: str
    num_positions: int
    num_sequences: int
    num_layouts: int
    query_heads: int
    key_heads: int
    is_query: bool
    is_scaled: bool

    def draw(self, draw: Draw) -> Tensors:
        """Return queries [R, B, H, D], or queries, keys and values together [R, B, G, (H / G + 2) * D]; a gradient."""
        size, heads = (self.num_positions, self.num_sequences), self.query_heads if self.is_query else self.key_heads
        mixed = (self.key_heads, (self.query_heads // self.key_heads + 2) * HEAD_DIM)
        x = draw(*size, heads, HEAD_DIM) if self.is_query else draw(*size, *mixed)
        return {"x": x.requires_grad_(), "gradient": draw(*size, heads, HEAD_DIM)}

    def run(self, inputs: Tensors) -> Tensors:
        """Return what apply_rotation and its backward give on the inputs' device."""
        x = inputs["x"]
        positions = self._position_ids().to(x.device)
        rotation = RotationBuilder(ROPE, HEAD_DIM).build(positions, x.dtype, scales_queries=self.is_scaled)

        def rotate(x: Tensor) -> Tensor:
            return apply_rotation(self._select(x), rotation, scale=self.is_query)

        return differentiate(rotate, inputs, inputs["gradient"])

    def compute_reference(self, inputs: Tensors) -> Tensors:
        """Return pairs (d, d + D/2) turned by position times frequency, times the scale."""
        positions = self._position_ids().T[:, :, None, None].double()
        angles = positions * RotationBuilder(ROPE, HEAD_DIM).inverse_frequencies.double()
        cos, sin = angles.cos(), angles.sin()
        periods = (positions / ROPE.original_max_position_embeddings).floor()
        is_scaled = self.is_query and self.is_scaled
        scale = 1 + ROPE.llama_4_scaling_beta * (1 + periods).log() if is_scaled else torch.ones(())

        def rotate(x: Tensor) -> Tensor:
            first, second = self._select(x).chunk(2, dim=-1)
            return scale * torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return differentiate(rotate, inputs, inputs["gradient"])

    def _select(self, x: Tensor) -> Tensor:
        return x if self.is_query else x[..., -2 * HEAD_DIM : -HEAD_DIM]

    def _position_ids(self) -> Tensor:
        """Return [num_layouts, R] positions of documents that begin at different places."""
        index = torch.arange(self.num_positions)
        return torch.stack([(index + 7 * number) % (100 - number) for number in range(self.num_layouts)])


@dataclass(frozen=True)
class SwiGLUCase:
    """megatron-core's SwiGLU, forward and backward, at the inner width of this tensor-parallel rank."""

    name: str
    num_positions: int
    num_sequences: int
    width: int

    def draw(self, draw: Draw) -> Tensors:
        """Return x [R, B, 2F] and a gradient [R, B, F]."""
        size = (self.num_positions, self.num_sequences)
        return {"x": draw(*size, 2 * self.width).requires_grad_(), "gradient": draw(*size, self.width)}

    def run(self, inputs: Tensors) -> Tensors:
        """Return what the module for CUDA computes."""
        return differentiate(CompiledSwiGLU(None), inputs, inputs["gradient"])

    def compute_reference(self, inputs: Tensors) -> Tensors:
        """Return gate * sigmoid(gate) * up and its gradient."""

        def swiglu(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return gate * torch.sigmoid(gate) * up

        return differentiate(swiglu, inputs, inputs["gradient"])


def list_rotation_cases(num_positions: int, query_heads: int, key_heads: int, label: str) -> list[RotationCase]:
    """Return every form: queries scaled or not, keys; one sequence, or two with the position ids of one or of each."""
    cases = []
    for num_sequences, num_layouts, layouts in ((1, 1, "single"), (2, 1, "one"), (2, 2, "each")):
        for is_query, is_scaled in ((True, False), (True, True), (False, True)):
            form = f"{'queries' if is_query else 'keys'}{'_scaled' if is_query and is_scaled else ''}_{layouts}"
            size = (num_positions, num_sequences, num_layouts)
            cases.append(RotationCase(f"rotation/{form}/{label}", *size, query_heads, key_heads, is_query, is_scaled))
    return cases
