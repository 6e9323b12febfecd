"""Our configuration in megatron-core's terms."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import Dtype, ModelConfig, ParallelConfig, PrecisionConfig, Recompute
from model.spec import choose_gradient_accumulation_fusion

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """The TransformerConfig of one rank. Position handling is ours (model/rope.py), so none is configured here."""
    dtype = TORCH_DTYPES[precision.dtype]
    full = parallel.recompute is Recompute.full
    virtual = parallel.virtual_pipeline_parallel
    fusion, _ = choose_gradient_accumulation_fusion()
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
        # Weights always come from elsewhere: a checkpoint, or model/initialise.py, which no layout changes.
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=fusion,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # the activation is a module of the layer: ours (model/swiglu.py)
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        # Two sends between the same two ranks in one batch train wrongly without an error (PP 2 interleaved).
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        # The loss is normalised before the backward (pretrain/objective): no averaging after it.
        calculate_per_token_loss=True,
        recompute_granularity=None if parallel.recompute is Recompute.none else parallel.recompute.value,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )
