"""Which modules a layer is made of: Transformer Engine on CUDA when it can be imported, else megatron-core's own.

Both name their weights alike on disk (Transformer Engine's names), so checkpoints move between the two.
"""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from model.attention.core import CoreAttention
from model.norm import RMSNorm
from model.swiglu import SwiGLU


def choose_transformer_engine() -> tuple[bool, str]:
    """Whether to build Transformer Engine layers, and why."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return False, "transformer_engine is not installed (make setup GPU=1)"
    return True, "CUDA device and transformer_engine found"


def choose_gradient_accumulation_fusion() -> tuple[bool, str]:
    """Whether weight gradients may be added in the GEMM: Apex's CUDA extension does it for megatron-core's layers."""
    found = torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return found, f"Apex's fused_weight_gradient_mlp_cuda {'found' if found else 'not found'}"


def build_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline rank (and virtual stage) with our core attention in each."""
    use_transformer_engine, _ = choose_transformer_engine()
    layer = _transformer_engine_layer() if use_transformer_engine else _local_layer()
    layer.submodules.self_attention.submodules.core_attention = CoreAttention  # type: ignore[union-attr]
    layer.submodules.mlp.keywords["submodules"].activation_func = SwiGLU  # type: ignore[union-attr]
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=_final_norm(use_transformer_engine))


def _local_layer() -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    return layer


def _transformer_engine_layer() -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec()


def _final_norm(use_transformer_engine: bool) -> Any:
    if not use_transformer_engine:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
