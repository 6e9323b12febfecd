"""Cases of decoding with fixed shapes: what `model.encoder.compile()` compiles for one kind of forward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.hf.attention_mask import TokenLayout, make_group_layout, make_prefill_layout
from model.hf.cache import CachedModel
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from tests.kernels.case import Draw, Tensors

# A short original context, so that short sequences scale queries.
ROPE = default_rope_parameters() | {"original_max_position_embeddings": 64}


@dataclass(frozen=True)
class DecodingCase:
    """One forward after a prefill of num_prompt tokens: the layers of a model with these widths, compiled.

    sizes: fields of its configuration. layout: maps the decode's model to that of the new tokens. num_prompt: 0 where
    the forward is itself the prefill. capacity: slots of the cache, all of which attention is shown after the prefill.
    """

    name: str
    sizes: dict[str, int]
    layout: Callable[[CachedModel], TokenLayout]
    num_prompt: int
    capacity: int
    num_sequences: int = 2

    def draw(self, draw: Draw) -> Tensors:
        """Return the weights by name, scaled to keep the size of activations."""
        shapes = {name: tuple(weight.shape) for name, weight in self._build_model().named_parameters()}
        return {name: draw(*shape) * shape[-1] ** (-0.5 if len(shape) > 1 else 0) for name, shape in shapes.items()}

    def run(self, inputs: Tensors) -> Tensors:
        """Return the hidden states [B, N, hidden] of the new tokens, the layers compiled on CUDA."""
        model = self._build_model()
        for name, weight in inputs.items():
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = torch.nn.Parameter(weight, requires_grad=False)
        device = next(iter(inputs.values())).device
        with torch.no_grad():
            cached = CachedModel(model, self.capacity, mask_token_id=0)
            if self.num_prompt:
                cached.encode_context("prefill", self._draw_tokens(self.num_prompt, 1).to(device))
            layout = self.layout(cached)
            if device.type == "cuda":
                model.encoder.compile(dynamic=False)
            tokens = self._draw_tokens(layout.num_tokens, 2).to(device)
            return {"hidden": cached.encode("forward", tokens, layout)}

    def compute_reference(self, inputs: Tensors) -> Tensors:
        """Return the same from the same layers, uncompiled, in float64 and without fixed shapes."""
        return self.run(inputs)

    def _build_model(self) -> Any:
        sizes: dict[str, Any] = dict(self.sizes)
        with torch.device("meta"):
            return NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig(rope_parameters=ROPE, **sizes))

    def _draw_tokens(self, num_tokens: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.sizes["vocab_size"], (self.num_sequences, num_tokens), generator=generator)


def list_decoding_cases(
    sizes: dict[str, int], num_prompt: int, capacity: int, block_length: int, label: str
) -> list[DecodingCase]:
    """Return a case for every kind of forward: prefills, a step, a block, a verification, and quadratic's.

    Quadratic self-speculation verifies a draft and drafts after it, after every token (stored layout) or after
    few that each sequence chooses.
    """

    def make_groups(cached: CachedModel) -> TokenLayout:
        every_end = torch.arange(block_length, device=cached.device)[None]
        return make_group_layout(block_length - 1, every_end, block_length, is_reused=True)

    def make_chosen_groups(cached: CachedModel) -> TokenLayout:
        chosen = torch.tensor([[0, 2, 5], [0, 1, 7]], device=cached.device)
        return make_group_layout(block_length - 1, chosen, block_length, is_reused=False)

    prefills: dict[str, Callable[[CachedModel], TokenLayout]] = {
        "prefill": lambda cached: cached.layout(num_prompt),
        "prefill_quadratic": lambda cached: make_prefill_layout(num_prompt, block_length),
    }
    layouts: dict[str, Callable[[CachedModel], TokenLayout]] = {
        "step": lambda cached: cached.layout(1),
        "block": lambda cached: cached.layout(block_length, bidirectional=True),
        "verify": lambda cached: cached.layout(block_length),
        "quadratic": make_groups,
        "quadratic_chosen": make_chosen_groups,
    }
    return [
        DecodingCase(f"decoding/{kind}/{label}", sizes, layout, 0 if kind in prefills else num_prompt, capacity)
        for kind, layout in (prefills | layouts).items()
    ]
