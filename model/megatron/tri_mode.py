"""Define the trained model: megatron-core's parallel parts under a thin top of our own.

Parameter names are those of megatron-core's GPTModel, so checkpoints stay interchangeable with other Megatron tools.

The last layer continues with scored positions alone once its attention is done. It needs keys and values of the others,
for scored ones see them; their output projection, MLP and final norm would be computed for nothing. In the joint stage
a quarter of the positions has no loss, in SFT most. Sequence parallelism excludes it: there the residual stream is
split by positions, and the remaining ones would have to be distributed anew.
A model that reads images has a vision tower beside its embedding (model/megatron/vision.py, image_features.py).
Shapes: B batch, R positions (S, or 2S as [noisy | clean] in the joint stage), H hidden size, V/T vocabulary of a rank,
N scored positions (in the last layer filled up to a multiple).
"""

from copy import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

from conf.schema import ModelConfig
from model.attention.plan import AttentionPlan, CoreAttention
from model.megatron.embedding import Embedding
from model.megatron.head import ScoredPositions, VocabularyHead
from model.megatron.image_features import MicrobatchImages, insert_features
from model.megatron.vision import VisionEncoder

MAX_LAST_SHARE = 0.9  # of all positions: beyond, selecting them costs what leaving out the others saves
MULTIPLE, FP8_MULTIPLE = 16, 128  # of positions, for whole tiles; matmuls in 8 bits need them


class TriModeModel(LanguageModule):
    """One pipeline stage: embedding and vision tower on the first, layers on each, norm and head on the last.

    vision_dtype: what the tower computes in.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        spec: TransformerBlockSubmodules,
        pre_process: bool,
        post_process: bool,
        loss_chunk_rows: int,
        vision_dtype: torch.dtype = torch.float32,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.loss_chunk_rows = loss_chunk_rows
        if pre_process:
            self.embedding = Embedding(config, model.vocab_size)
            if model.vision is not None:
                self.vision = VisionEncoder(config, model, vision_dtype)
        self.decoder = TransformerBlock(
            config, spec, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            self.output_layer = VocabularyHead(
                config.hidden_size,
                model.vocab_size,
                config=without_fused_accumulation(config),
                init_method=config.init_method,  # type: ignore[arg-type]
                bias=False,
                gather_output=False,
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Take the hidden states of the pipeline stage before, as megatron-core's schedules set them."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)  # type: ignore[arg-type]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return one entry per layer (not per stack), so that any layout and the converter address layers by name.

        Modules' `_extra_state` (FP8 scales, else empty) is left out: it would tie a checkpoint to the layer kind.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def forward(
        self,
        tokens: Tensor,
        plan: AttentionPlan,
        scored: ScoredPositions | None = None,
        images: MicrobatchImages | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map tokens [B, R] and perhaps images to hidden [R, B, H], or to what the last pipeline stage makes of it.

        Returns:
            On the last stage with `scored`: the weighted loss and the cross entropy of every scored position [N].
            On it without: the logits of this rank's vocabulary [R, B, V/T].
        """
        hidden = self.embedding(tokens, position_ids=None) if self.pre_process else None
        if hidden is not None and images is not None:
            hidden = insert_features(hidden, images, self.vision)
        if self.post_process and scored is not None:
            plan = self.narrow(plan, scored, tokens.numel())
        hidden = self.decoder(hidden, attention_mask=None, attention_bias=plan)
        if not self.post_process:
            return hidden
        if scored is None:
            return self.output_layer(hidden)
        return self.score(hidden, scored, plan)

    def narrow(self, plan: AttentionPlan, scored: ScoredPositions, num_positions: int) -> AttentionPlan:
        """Return the plan by which the last layer continues with scored positions alone, if it can and that pays."""
        if self.config.sequence_parallel:
            return plan
        return narrow_last_layer(plan, scored.positions, num_positions, FP8_MULTIPLE if self.config.fp8 else MULTIPLE)

    def score(self, hidden: Tensor, scored: ScoredPositions, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Return the loss and cross entropies of the decoder's output under this plan, as forward with `scored`."""
        if self.config.sequence_parallel:
            # ChunkedCrossEntropy returns the whole gradient on each rank: going back, split it, do not sum it again.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.flatten(0, 1)
        rows = rows[scored.positions] if plan.last_positions is None else rows[: len(scored.positions)]
        return self.output_layer(rows, scored, self.loss_chunk_rows)


def without_fused_accumulation(config: TransformerConfig) -> TransformerConfig:
    """Return the head's configuration: head.py adds its gradient itself, and a fused matmul would need Apex."""
    config = copy(config)
    config.gradient_accumulation_fusion = False
    return config


def narrow_last_layer(
    plan: AttentionPlan, positions: Tensor, num_positions: int, multiple: int = MULTIPLE
) -> AttentionPlan:
    """Return the plan by which the last layer continues with `positions` [N] of num_positions alone, if that pays.

    Position 0 fills up to a multiple, at least one; its output there is ignored.
    """
    count = max(1, -(-len(positions) // multiple)) * multiple
    if count > MAX_LAST_SHARE * num_positions:
        return plan
    return replace(plan, last_positions=torch.cat([positions, positions.new_zeros(count - len(positions))]))


def build_last_layer(layer: ModuleSpec) -> ModuleSpec:
    """Return the spec of the last layer, given that of the others."""
    submodules: Any = layer.submodules
    attention = submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=LastCoreAttention))
    return replace(layer, module=LastLayer, submodules=replace(submodules, self_attention=attention))


class LastCoreAttention(CoreAttention):
    """Attention of all positions that returns the output of the plan's last positions."""

    def forward(self, *inputs: Any, attention_bias: AttentionPlan, **options: Any) -> Tensor:
        """Map inputs as CoreAttention does, to [N, 1, H * D] where the plan names N last positions."""
        return attention_bias.take_last_positions(super().forward(*inputs, attention_bias=attention_bias, **options))


class LastLayer(TransformerLayer):
    """megatron-core's layer, whose residual stream narrows to the plan's last positions after its attention."""

    def _forward_attention(  # type: ignore[override]
        self, hidden_states: Tensor, *inputs: Any, attention_bias: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        """Map hidden_states [R, B, H] to the same, or to [N, 1, H] where the plan names N last positions."""
        plan: AttentionPlan = attention_bias
        if plan.last_positions is None:
            return super()._forward_attention(hidden_states, *inputs, attention_bias=attention_bias, **options)
        assert not self.recompute_input_layernorm, "model/megatron/transformer_config.py asks for attention alone"
        normed = apply_module(self.input_layernorm)(hidden_states)
        attended, _ = self.self_attention(normed, attention_mask=None, attention_bias=attention_bias)
        return plan.take_last_positions(hidden_states) + attended, None
