"""The trained model: megatron-core's parallel parts under our own thin top.

Parameter names are those of megatron-core's GPTModel, so checkpoints stay interchangeable with other Megatron tools.
Shapes: B batch, R rows (S, or 2S as [noisy | clean] in the joint stage), H hidden size, V/T vocabulary of a rank.
"""

from copy import copy
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from conf.schema import ModelConfig
from model.attention.plan import AttentionPlan
from model.megatron.embedding import Embedding
from model.megatron.head import ScoredPositions, VocabularyHead
from model.megatron.last_layer import FP8_MULTIPLE, MULTIPLE, keep_scored_rows


class TriModeModel(LanguageModule):
    """One pipeline stage of the decoder: embedding on the first, layers on each, norm and head on the last."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        spec: TransformerBlockSubmodules,
        pre_process: bool,
        post_process: bool,
        loss_chunk_rows: int,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.loss_chunk_rows = loss_chunk_rows
        if pre_process:
            self.embedding = Embedding(config, model.vocab_size)
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
        """Hidden states from the stage before, set by megatron-core's pipeline schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)  # type: ignore[arg-type]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One entry per layer (not per stack), so that any layout and the converter address a layer by its name.

        Modules' `_extra_state` (FP8 scales, else empty) is left out: it would tie a checkpoint to the layer kind.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def forward(
        self, tokens: Tensor, plan: AttentionPlan, scored: ScoredPositions | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [B, R] -> hidden [R, B, H] before the last stage; on it (weighted loss, cross entropy per row [N])
        with `scored`, else the logits of this rank's vocabulary [R, B, V/T]."""
        hidden = self.embedding(tokens, position_ids=None) if self.pre_process else None
        if self.post_process and scored is not None:
            plan = self.narrow(plan, scored, tokens.numel())
        hidden = self.decoder(hidden, attention_mask=None, attention_bias=plan)
        if not self.post_process:
            return hidden
        if scored is None:
            return self.output_layer(hidden)
        return self.score(hidden, scored, plan)

    def narrow(self, plan: AttentionPlan, scored: ScoredPositions, num_rows: int) -> AttentionPlan:
        """The plan by which the last layer keeps scored rows alone, if it can and that pays."""
        if self.config.sequence_parallel:
            return plan
        return keep_scored_rows(plan, scored.positions, num_rows, FP8_MULTIPLE if self.config.fp8 else MULTIPLE)

    def score(self, hidden: Tensor, scored: ScoredPositions, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """What the decoder gave by this plan -> as forward with `scored`."""
        if self.config.sequence_parallel:
            # ChunkedCrossEntropy returns the whole gradient on each rank: going back, split it, do not sum it again.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.flatten(0, 1)
        rows = rows[scored.positions] if plan.last_positions is None else rows[: len(scored.positions)]
        return self.output_layer(rows, scored, self.loss_chunk_rows)


def without_fused_accumulation(config: TransformerConfig) -> TransformerConfig:
    """For the head: head.py adds its gradient itself, and megatron-core's fused product would want Apex."""
    config = copy(config)
    config.gradient_accumulation_fusion = False
    return config
