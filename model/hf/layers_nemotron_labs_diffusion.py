"""The decoder: RMSNorm, grouped-query attention, SwiGLU. Everything that varies per call is an argument.

Shapes: B batch, N new tokens, T cached + new tokens, H query heads, K key/value heads, G = H / K, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter_nemotron_labs_diffusion import DraftRows, project_output
from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from .rope_nemotron_labs_diffusion import PositionEncoding, RotaryEmbedding, rotate
from .visibility_nemotron_labs_diffusion import ALL_SEEN, Visibility


class NemotronLabsDiffusionRMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (or wider) and returned in the dtype of its input."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if hidden.dtype in (torch.float32, torch.float64):
            return torch.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)
        return self.weight * torch.rms_norm(hidden.float(), self.weight.shape, None, self.epsilon).to(hidden.dtype)


class NemotronLabsDiffusionAttention(nn.Module):
    """Grouped-query attention; heads * head_dim need not equal the hidden size."""

    def __init__(self, config: NemotronLabsDiffusionConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        positions: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftRows | None = None,
    ) -> Tensor:
        """hidden [B, N, hidden] -> [B, N, hidden]; drafting: as in project_output."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        projected = torch.cat((self.q_proj(hidden), self.k_proj(hidden)), dim=-1).view(heads).transpose(1, 2)
        query, key = rotate(projected, positions).split((self.num_heads, self.num_key_value_heads), dim=1)
        if positions.query_scale is not None:
            query = query * positions.query_scale
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        return project_output(self.o_proj, self._attend(query, key, value, visibility).flatten(2), drafting)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """query [B, H, N, D], key and value [B, K, T, D] -> [B, N, H, D], without repeating key/value heads."""
        if num_causal := visibility.num_causal:
            first, keys, values = (states[:, :, :num_causal] for states in (query, key, value))
            attended = scaled_dot_product_attention(first, keys, values, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2)
            if num_causal == query.shape[2]:
                return attended
            behind = self._attend(query[:, :, num_causal:], key, value, ALL_SEEN)
            return torch.cat((attended, behind), dim=1)
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
        self,
        hidden: Tensor,
        positions: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftRows | None = None,
    ) -> Tensor:
        """hidden [B, N, hidden] -> [B, N, hidden]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, visibility, cache, drafting)
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
        positions: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftRows | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens [B, N, hidden] at `positions` -> normed [B, N, hidden].

        cache: None, one of transformers' caches, or a PrefixCache that has begun a forward of N tokens.
        drafting: which of N a draft adapter applies to (see project_output).
        collected: if given, receives what enters each layer and, last, the result.
        """
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden)
            hidden = layer(hidden, positions, visibility, cache, drafting)
        hidden = self.norm(hidden)
        if collected is not None:
            collected.append(hidden)
        return hidden
