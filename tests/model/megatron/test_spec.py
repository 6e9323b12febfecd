"""Weight names on disk do not depend on what a layer is made of, and settings reach megatron-core."""

import torch

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recompute
from model.convert.mapping import build_tensor_table
from model.megatron.transformer_config import build_transformer_config

MODEL = ModelConfig("toy", 2, 64, 96, 4, 2, 32, 384)

# What megatron-core's Transformer Engine layers call their weights (norms live in the linear that follows them).
TRANSFORMER_ENGINE_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}


def test_the_converter_speaks_transformer_engine_names() -> None:
    names = {entry.megatron for entry in build_tensor_table(MODEL)}
    layers = {f"decoder.layers.{i}.{name}" for i in range(2) for name in TRANSFORMER_ENGINE_LAYER}
    top = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    assert names == layers | top


def test_recomputation_and_layout_reach_megatron_core() -> None:
    parallel = ParallelConfig(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True, recompute=Recompute.full)
    config = build_transformer_config(MODEL, parallel, PrecisionConfig())
    assert config.recompute_granularity == "full"
    assert config.sequence_parallel
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (2, 2)
    assert config.kv_channels == 32
    assert config.params_dtype is torch.bfloat16
