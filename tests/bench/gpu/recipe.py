"""The public vendor recipe of the joint step, restated in plain torch, and the changes that lead from it to ours.

The recipe: FlexAttention under a BlockMask of the joint mask with key heads repeated for every query head, logits of
all 2L positions, cross entropy of all of them, then selection; on CUDA every layer and the head are compiled. Every
change can be switched on by itself. It computes with the very weights of a model of our trainer, whose hooks add the
gradients to the fp32 buffer, so that both sides hold the same and leave their results in the same place.
Without CUDA nothing is compiled, and a dense mask takes the BlockMask's place: FlexAttention has no backward there.
Shapes: R positions (2L: [noisy | clean]) of one sequence, C hidden size, H query heads, G key heads, D head_dim.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, scaled_dot_product_attention

from conf.schema import ModelConfig, Objective
from model.attention.flex import FlexAttention, build_flex_attention
from model.attention.rotation import Rotation, apply_rotation
from model.attention.visibility import compute_dense_mask, find_visible_keys
from model.megatron.embedding import _Lookup
from model.megatron.head import ScoredPositions, score_rows
from model.megatron.operators import _RMSNorm, _SwiGLU
from tests.bench.gpu import plain
from tests.bench.joint.cases import Case, build_input
from tests.bench.joint.sides import Side

Turn = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Changes:
    """Changes that lead from the recipe to ours.

    grouped_heads: key heads are not repeated. scored_positions: only these are projected. chunked_head: they are
    projected in chunks whose gradient is formed in the forward. gradients_in_buffer: the gradients of head and
    embedding go there at once.
    our_operators: norm, SwiGLU and rotation as model/megatron/kernel_choice.py chooses them; layers are not compiled.
    """

    grouped_heads: bool = False
    scored_positions: bool = False
    chunked_head: bool = False
    gradients_in_buffer: bool = False
    our_operators: bool = False


def list_changes() -> dict[str, Changes]:
    """List the changes from the recipe towards ours, each with all before it."""
    changes, found = Changes(), {"recipe": Changes()}
    for name in Changes.__dataclass_fields__:
        changes = replace(changes, **{name: True})
        found[f"+ {name.replace('_', ' ')}"] = changes
    return found


class RecipeLayer(nn.Module):
    """One decoder layer, which uses the weights of megatron-core's `layer`."""

    def __init__(self, layer: Any, model: ModelConfig, changes: Changes) -> None:
        super().__init__()
        attention, mlp = layer.self_attention, layer.mlp
        self.eps, self.groups, self.head_dim, self.changes = (
            model.rms_norm_eps,
            model.num_key_value_heads,
            model.head_dim,
            changes,
        )
        self.input_norm = _norm_weight(layer.input_layernorm, attention.linear_qkv)
        self.mlp_norm = _norm_weight(layer.pre_mlp_layernorm, mlp.linear_fc1)
        self.qkv, self.proj = attention.linear_qkv.weight, attention.linear_proj.weight
        self.fc1, self.fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight

    def forward(self, x: Tensor, rotation: Turn, mask: Any) -> Tensor:
        """Return the layer's output [R, C].

        x [R, C], rotation: cos, sin [R, 1, D] and query scale [R, 1, 1] or None.
        """
        x = x + self.attend(normalise(x, self.input_norm, self.eps, self.changes), rotation, mask)
        inner = linear(normalise(x, self.mlp_norm, self.eps, self.changes), self.fc1)
        if self.changes.our_operators:
            return x + linear(bias_swiglu_impl(inner, None) if x.is_cuda else _SwiGLU.apply(inner), self.fc2)
        return x + linear(plain.swiglu(inner), self.fc2)

    def attend(self, x: Tensor, rotation: Turn, mask: Any) -> Tensor:
        """Attend; the outputs of qkv are by key head: its query heads, its key, its value."""
        heads = linear(x, self.qkv).view(len(x), self.groups, -1, self.head_dim)
        query, key, value = heads.split([heads.shape[2] - 2, 1, 1], dim=2)
        query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
        query, key = self.rotate(query, rotation, scale=True), self.rotate(key, rotation, scale=False)
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        if not self.changes.grouped_heads:
            repeats = query.shape[1] // self.groups
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        attended = self.see(query, key, value, mask)
        return linear(attended[0].transpose(0, 1).flatten(1), self.proj)

    def see(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """Attend under the mask: query [1, H, R, D], key and value [1, G or H, R, D]."""
        grouped = self.changes.grouped_heads
        if mask is None:  # saved.py
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        if isinstance(mask, Tensor):
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        if self.changes.our_operators:  # not inside a compiled layer: compiled by itself
            return FlexAttention(mask)(query, key, value)
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)  # type: ignore[return-value]

    def rotate(self, x: Tensor, rotation: Turn, scale: bool) -> Tensor:
        """Rotate x [R, heads, D]."""
        cos, sin, query_scale = rotation
        if self.changes.our_operators:
            scales = None if query_scale is None else query_scale[:, None]
            return apply_rotation(x[:, None], Rotation(cos[:, None], sin[:, None], scales), scale)[:, 0]
        return plain.rotate(x, cos, sin, query_scale if scale else None)


class Recipe:
    """A joint step like that of a Side and with its weights; run returns the loss alone."""

    def __init__(self, side: Side, case: Case, changes: Changes) -> None:
        module: Any = side.module
        self.changes, self.case, (microbatch,) = changes, case, side.step.microbatches
        self.layers = [RecipeLayer(layer, case.model, changes) for layer in module.decoder.layers]
        self.embedding, self.norm = module.embedding.word_embeddings.weight, module.decoder.final_layernorm.weight
        self.head = module.output_layer.weight
        self.tokens, self.scored, rotation = microbatch.tokens[0], microbatch.scored, microbatch.plan.rotation
        scales = rotation.query_scale
        self.rotation = (rotation.cos[:, 0], rotation.sin[:, 0], None if scales is None else scales[:, 0])
        layout = build_input(case, Objective.joint).layout.to(case.device)
        on_cuda = case.device.type == "cuda"
        self.mask: Any = (
            build_flex_attention(find_visible_keys(layout, True)).block_mask
            if on_cuda
            else compute_dense_mask(layout, True)[:, None]
        )
        self.all_targets = self.tokens.index_copy(0, self.scored.positions, self.scored.targets)
        self.run_layer: Any = _run_layer
        self.score_whole: Any = _score_whole
        if on_cuda and not changes.our_operators:
            self.run_layer = torch.compile(_run_layer, dynamic=False)
        if on_cuda:
            self.score_whole = torch.compile(_score_whole, dynamic=False)

    def run(self) -> Tensor:
        """Run forward and backward and return the loss."""
        x = self.embed()
        for layer in self.layers:
            x = self.run_layer(layer, x, self.rotation, self.mask)
        loss = self.score(x)
        loss.backward()
        return loss.detach()

    def embed(self) -> Tensor:
        if self.changes.gradients_in_buffer:
            return _Lookup.apply(self.embedding, self.tokens[None], None)[0]
        return embedding(self.tokens, self.embedding)

    def score(self, x: Tensor) -> Tensor:
        """Return the loss of hidden states [R, C]."""
        scored, eps = self.scored, self.case.model.rms_norm_eps
        if not self.changes.scored_positions:
            everything = replace(scored, targets=self.all_targets)
            return self.score_whole(x, self.norm, self.head, everything, eps, self.changes)
        if not self.changes.chunked_head:
            return self.score_whole(x, self.norm, self.head, scored, eps, self.changes)
        hidden = normalise(x, self.norm, eps, self.changes)[scored.positions]
        # Only the weight itself has a buffer; through a view of it, its gradient is returned.
        weight = self.head if self.changes.gradients_in_buffer else self.head.view(self.head.shape)
        group: Any = parallel_state.get_tensor_model_parallel_group()
        loss_chunk_rows = self.case.runtime.loss_chunk_rows
        return score_rows(hidden, weight, scored.targets, scored.weights, loss_chunk_rows, group)[0]


def normalise(x: Tensor, weight: Tensor, eps: float, changes: Changes) -> Tensor:
    """Return the RMSNorm of [R, C], computed in fp32 at least."""
    if changes.our_operators:
        return rms_norm(x, weight.shape, weight, eps) if x.is_cuda else _RMSNorm.apply(x, weight, eps)
    return plain.norm(x, weight, eps)


def _run_layer(layer: RecipeLayer, x: Tensor, rotation: Turn, mask: Any) -> Tensor:
    return layer(x, rotation, mask)


def _score_whole(
    x: Tensor, norm: Tensor, head: Tensor, scored: ScoredPositions, eps: float, changes: Changes
) -> Tensor:
    """Return the weighted loss of the scored positions from whole logits: of all, then selected, or of these alone."""
    hidden = normalise(x, norm, eps, changes)
    if changes.scored_positions:
        hidden = hidden[scored.positions]
    logits = linear(hidden, head)
    losses = cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), scored.targets, reduction="none"
    )
    if not changes.scored_positions:
        losses = losses[scored.positions]
    return (losses * scored.weights).sum()


def _norm_weight(norm: Any, linear_after: Any) -> Any:
    """Return the norm's weight, which Transformer Engine has in the linear layer that follows."""
    return norm.weight if hasattr(norm, "weight") else linear_after.layer_norm_weight
