"""Translate our configuration into megatron-core's."""

from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import Dtype, Fp8Recipe, ModelConfig, ParallelConfig, PrecisionConfig, Recompute
from model.megatron.kernel_choice import choose_fused_operators, choose_gradient_accumulation_fusion

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
# Formats of activations and weights; gradients of activations have e5m2 in hybrid.
FP8_FORMATS: dict[Fp8Recipe, Literal["hybrid", "e4m3"]] = {Fp8Recipe.tensorwise: "hybrid", Fp8Recipe.blockwise: "e4m3"}


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Return the TransformerConfig of one rank. rotation.py handles positions, so none are configured here."""
    dtype = TORCH_DTYPES[precision.dtype]
    full = parallel.recompute is Recompute.full
    granularity = parallel.recompute.value if parallel.recompute in (Recompute.selective, Recompute.full) else None
    virtual = parallel.virtual_pipeline_parallel
    fusion, _ = choose_gradient_accumulation_fusion()
    # model/megatron/recompute.py recomputes the activation of a module of its own, not of megatron-core's MLP.
    fused = choose_fused_operators()[0] and parallel.recompute is not Recompute.elementwise
    fp8 = precision.fp8
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel,
        context_parallel_size=parallel.context_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights always come from elsewhere: a checkpoint, or model/megatron/initialise.py, which no layout changes.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=fusion,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # the activation is a module of the layer (model/megatron/operators.py)
        bias_dropout_fusion=False,  # with neither bias nor dropout it would compile one addition
        persist_layer_norm=False,
        # Two sends between the same two ranks in one batch train wrongly without an error (PP 2 interleaved).
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.overlap_pipeline,
        tp_comm_overlap=parallel.overlap_tensor_parallel,
        deallocate_pipeline_outputs=True,
        # The loss is normalised before the backward (pretrain/objective): no averaging after it.
        calculate_per_token_loss=True,
        recompute_granularity=granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        cpu_offloading=parallel.offload_layers > 0,
        cpu_offloading_num_layers=parallel.offload_layers,
        # Both recipes compute every tensor's scale anew: a checkpoint holds none, and a resumed run continues exactly.
        # Delayed scaling would hold a history per matmul. fp8_param stays off: weights are bf16 everywhere.
        fp8=None if fp8 is None else FP8_FORMATS[fp8],
        fp8_recipe="tensorwise" if fp8 is None else fp8.value,
    )
