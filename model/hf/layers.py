"""The decoder: RMSNorm, grouped-query attention, SwiGLU, and the draft adapter on their output projection.

Mode and cache are arguments of each call. Shapes: B sequences, N new tokens, T cached and new tokens, H query heads, K
key/value heads, G = H / K, D head_dim.

A draft adapter (`linear_spec_lora/`) changes only `self_attn.o_proj`, and only at the positions that draft. These are
an argument, so that drafted and verified tokens can share a forward. An adapter that also changes other projections is
taken for a fine-tuned model: it belongs to verifier and drafter alike and stays on, also beside a draft adapter.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_mask import ALL_SEEN, Visibility
from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from .rope import PositionEncoding, rotate

NO_POSITIONS, ALL_POSITIONS = slice(0, 0), slice(None)


@dataclass(frozen=True)
class DraftPositions:
    """The positions of a forward that draft, and the adapters that apply to them alone.

    Attributes:
        names: of these adapters.
        positions: those of the N new tokens.
    """

    names: frozenset[str]
    positions: slice


class NemotronLabsDiffusionRMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 (or wider) and returned in the dtype of its input."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., size]."""
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
        encoding: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftPositions | None = None,
    ) -> Tensor:
        """Map hidden [B, N, hidden] to [B, N, hidden]; drafting: as in project_output."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        projected = torch.cat((self.q_proj(hidden), self.k_proj(hidden)), dim=-1).view(heads).transpose(1, 2)
        query, key = rotate(projected, encoding).split((self.num_heads, self.num_key_value_heads), dim=1)
        if encoding.query_scale is not None:
            query = query * encoding.query_scale
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        return project_output(self.o_proj, self._attend(query, key, value, visibility).flatten(2), drafting)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
        """Attend with query [B, H, N, D] to key and value [B, K, T, D] -> [B, N, H, D], without repeating heads."""
        if num_causal := visibility.num_causal:
            first, keys, values = (states[:, :, :num_causal] for states in (query, key, value))
            attended = scaled_dot_product_attention(first, keys, values, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2)
            if num_causal == query.shape[2]:
                return attended
            others = self._attend(query[:, :, num_causal:], key, value, ALL_SEEN)
            return torch.cat((attended, others), dim=1)
        # The G heads of a group become queries of one head. Unlike enable_gqa this is open to every fused kernel, also
        # those with a mask, and reads each key once per group: up to 10x faster for single tokens on a CPU.
        batch, heads, num_new, head_dim = query.shape
        groups = heads // self.num_key_value_heads
        queries = query.reshape(batch, self.num_key_value_heads, groups * num_new, head_dim)
        attended = scaled_dot_product_attention(queries, key, value, attn_mask=visibility.mask)
        return attended.reshape(batch, heads, num_new, head_dim).transpose(1, 2)


class NemotronLabsDiffusionMLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., hidden] to [..., hidden]."""
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
        encoding: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftPositions | None = None,
    ) -> Tensor:
        """Map hidden [B, N, hidden] to [B, N, hidden]; the arguments are those of the encoder."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), encoding, visibility, cache, drafting)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class NemotronLabsDiffusionEncoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__()
        # No padding_idx: the start checkpoints' pad token is the instruct model's end-of-turn token and must train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronLabsDiffusionLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NemotronLabsDiffusionRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        encoding: PositionEncoding,
        visibility: Visibility,
        cache: Any,
        drafting: DraftPositions | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Map embedded tokens [B, N, hidden] to normed hidden states [B, N, hidden].

        Args:
            hidden: the embedded tokens.
            encoding: of their positions.
            visibility: which slots each of them sees.
            cache: None, one of transformers' caches, or a PrefixCache that has begun a forward of N tokens.
            drafting: the positions that a draft adapter applies to (see project_output).
            collected: if given, receives the input of each layer and, last, the result.
        """
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden)
            hidden = layer(hidden, encoding, visibility, cache, drafting)
        hidden = self.norm(hidden)
        if collected is not None:
            collected.append(hidden)
        return hidden


def _find_adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of any PEFT adapter on the text model by name; empty without one."""
    # An attached adapter implies that peft is loaded. It is not imported here because a checkpoint does not need it,
    # and transformers demands every package that a shipped file imports.
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    # A vision tower has modules called o_proj too; PEFT finds them for a drafter, whose file has no weights for them.
    modules = ((name, layer) for name, layer in model.named_modules() if "vision_tower." not in name)
    return {name: layer for name, layer in modules if isinstance(layer, tuners.BaseTunerLayer)}


def _is_active(layer: Any, adapter: str) -> bool:
    """Return whether an adapter changes what a layer computes."""
    return not layer.disable_adapters and adapter in layer.active_adapters and adapter in layer.lora_A


def find_draft_adapters(model: nn.Module) -> tuple[frozenset[str], list[Any]]:
    """Return the names of the enabled draft adapters of `model` and the layers they change; both empty without one.

    Raises:
        ValueError: one is merged into the weights, so that verification could not run without it, or it is not a plain
            LoRA.
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


def check_adapter_loaded(model: nn.Module, adapter: str) -> None:
    """Raise ValueError for an adapter that changes nothing: all that is added to outputs is zero."""
    layers = [layer for layer in _find_adapted_layers(model).values() if adapter in getattr(layer, "lora_B", ())]
    if layers and not any(bool(layer.lora_B[adapter].weight.any()) for layer in layers):
        raise ValueError(
            f"the adapter {adapter!r} changes nothing: its lora_B are all zero. transformers 5.0 to 5.5 read no weight "
            "of PEFT's files into this model; there, load it with PeftModel.from_pretrained(model, folder)"
        )


def project_output(o_proj: Any, attended: Tensor, drafting: DraftPositions | None) -> Tensor:
    """Apply o_proj to attended [B, N, width] -> [B, N, hidden], with draft adapters at drafting positions only.

    drafting: None leaves adapters to PEFT, which applies them at all positions while they are enabled.
    """
    if drafting is None or not hasattr(o_proj, "lora_A"):
        return o_proj(attended)
    output = o_proj.base_layer(attended)
    for name in o_proj.active_adapters:
        positions = drafting.positions if name in drafting.names else ALL_POSITIONS
        adapted = attended[:, positions]
        if adapted.shape[1] and _is_active(o_proj, name) and name not in o_proj.merged_adapters:
            output[:, positions] += _compute_update(o_proj, name, adapted).to(output.dtype)
    return output


def _compute_update(o_proj: Any, name: str, attended: Tensor) -> Tensor:
    """Compute what PEFT adds to the base layer's output for one adapter."""
    down, up = o_proj.lora_A[name], o_proj.lora_B[name]
    inputs = o_proj.lora_dropout[name](attended.to(down.weight.dtype))
    return up(down(inputs)) * o_proj.scaling[name]


class DraftAdapter:
    """The draft adapters of a model, if any, looked up once."""

    def __init__(self, model: nn.Module):
        """Find the adapters; raises what find_draft_adapters raises."""
        self._names, self._layers = find_draft_adapters(model)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._layers)

    def on(self, positions: slice) -> DraftPositions | None:
        """Return what applies the adapters at `positions` of a forward alone; None without an adapter."""
        return DraftPositions(self._names, positions) if self._layers else None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the body as if there were no draft adapter."""
        # This sets the list that PEFT's own methods set, without their walk over all modules (80x slower per use).
        before = [layer._active_adapter for layer in self._layers]
        try:
            for layer in self._layers:
                layer._active_adapter = [name for name in layer.active_adapters if name not in self._names]
            yield
        finally:
            for layer, names in zip(self._layers, before, strict=True):
                layer._active_adapter = names
