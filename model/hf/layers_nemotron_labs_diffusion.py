"""The decoder: RMSNorm, grouped-query attention, SwiGLU. Everything that varies per call is an argument.

Shapes: B batch, N new tokens, T cached + new tokens, H query heads, K key/value heads, G = H / K, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from .rope_nemotron_labs_diffusion import PositionEncoding, RotaryEmbedding, rotate


@dataclass(frozen=True)
class Visibility:
    """Which of the T tokens each of the N new ones sees.

    is_causal: token i sees tokens 0..i; only where nothing is cached (N == T) and `mask` is None.
    mask: [B or 1, 1, G*N, T] bool, true where seen, rows repeated for the G heads of a group; None: all are seen.
    """

    is_causal: bool
    mask: Tensor | None


def build_visibility(
    attention_mask: Tensor | None,
    *,
    num_new: int,
    num_total: int,
    bidirectional: bool,
    group_size: int,
    device: torch.device,
) -> Visibility:
    """Combine the mode with an optional mask.

    attention_mask: None; [B, T] with zeros on padding; or [B or 1, 1, N, T] bool, which then decides alone.
    bidirectional: new tokens see each other both ways (and the whole cache) instead of causally.
    group_size: G, query heads per key/value head.

    Raises:
        ValueError: attention_mask has another shape or, with four dimensions, is not bool.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:] != (1, num_new, num_total):
            raise ValueError(
                f"a 4D attention_mask must be bool [batch, 1, {num_new}, {num_total}] with true where a token is "
                f"seen, got {attention_mask.dtype} {list(attention_mask.shape)}"
            )
        return Visibility(False, attention_mask.repeat(1, 1, group_size, 1))
    padding = _read_padding(attention_mask, num_total)
    causal = num_new > 1 and not bidirectional
    if padding is None and (not causal or num_new == num_total):
        return Visibility(causal, None)
    queries = torch.arange(num_total - num_new, num_total, device=device)[:, None]
    keys = torch.arange(num_total, device=device)[None]
    mask = (keys <= queries) if causal else torch.ones_like(keys <= queries)
    if padding is None:
        return Visibility(False, mask.repeat(group_size, 1)[None, None])
    # A padding token sees at least itself: a row without any key would be NaN.
    mask = (mask & padding[:, None, None, :]) | (keys == queries)
    return Visibility(False, mask.repeat(1, 1, group_size, 1))


def _read_padding(attention_mask: Tensor | None, num_total: int) -> Tensor | None:
    """[B, T] bool, or None where nothing is padded."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_total:
        raise ValueError(
            f"attention_mask must be [batch, {num_total}] (cached and new tokens), got {list(attention_mask.shape)}"
        )
    return attention_mask != 0


class NemotronLabsDiffusionRMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (or wider) and returned in the dtype of its input."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        return self.weight * rms_norm(wide, self.weight.shape, None, self.epsilon).to(hidden.dtype)


class NemotronLabsDiffusionAttention(nn.Module):
    """Grouped-query attention; heads * head_dim need not equal the hidden size."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, positions: PositionEncoding, visibility: Visibility, cache: Any, commit: bool
    ) -> Tensor:
        """hidden [B, N, hidden] -> [B, N, hidden]; cache and commit as in the model's forward."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden).view(heads).transpose(1, 2), positions) * positions.query_scale
        key = rotate(self.k_proj(hidden).view(heads).transpose(1, 2), positions)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if cache is not None:
            extend = cache.update if commit else cache.preview
            key, value = extend(key, value, self.layer_index)
        return self.o_proj(self._attend(query, key, value, visibility).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """query [B, H, N, D], key and value [B, K, T, D] -> [B, N, H, D], without repeating key/value heads."""
        if visibility.is_causal:
            attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return attended.transpose(1, 2)
        # The G heads of a group become rows of one head. Unlike enable_gqa this is open to every fused kernel, also
        # those with a mask, and reads each key once per group: up to 10x faster for single tokens on a CPU.
        batch, heads, num_new, head_dim = query.shape
        groups = heads // self.num_key_value_heads
        rows = query.reshape(batch, self.num_key_value_heads, groups * num_new, head_dim)
        attended = scaled_dot_product_attention(rows, key, value, attn_mask=visibility.mask)
        return attended.reshape(batch, heads, num_new, head_dim).transpose(1, 2)


class NemotronLabsDiffusionMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class NemotronLabsDiffusionLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = NemotronLabsDiffusionRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = NemotronLabsDiffusionAttention(config, layer_index)
        self.post_attention_layernorm = NemotronLabsDiffusionRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = NemotronLabsDiffusionMLP(config)

    def forward(
        self, hidden: Tensor, positions: PositionEncoding, visibility: Visibility, cache: Any, commit: bool
    ) -> Tensor:
        """hidden [B, N, hidden] -> [B, N, hidden]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, visibility, cache, commit)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class NemotronLabsDiffusionEncoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__()
        # No padding_idx: the start checkpoints' pad token is the instruct model's end-of-turn token and must train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronLabsDiffusionLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NemotronLabsDiffusionRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_dim)

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        visibility: Visibility,
        cache: Any,
        commit: bool,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens [B, N, hidden] at position_ids [B or 1, N] -> normed [B, N, hidden].

        collected: if given, receives what enters each layer and, last, the result.
        """
        positions = self.rotary(position_ids, hidden.dtype)
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden)
            hidden = layer(hidden, positions, visibility, cache, commit)
        hidden = self.norm(hidden)
        if collected is not None:
            collected.append(hidden)
        return hidden
