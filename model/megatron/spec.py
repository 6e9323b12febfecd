"""Build the specs of a layer's modules: Transformer Engine's or megatron-core's own, as kernel_choice.py decides.

Both name their weights alike on disk (Transformer Engine's names), so checkpoints move between the two.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import Recompute
from model.attention.plan import CoreAttention
from model.megatron.kernel_choice import choose_fused_operators, choose_transformer_engine
from model.megatron.operators import CompiledSwiGLU, RMSNorm, SwiGLU, TorchRMSNorm
from model.megatron.recompute import recompute_elementwise
from model.megatron.tri_mode import build_last_layer


def build_block_spec(
    config: TransformerConfig, vp_stage: int | None, recompute: Recompute
) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline rank (and virtual stage) with our core attention in each."""
    use_transformer_engine, _ = choose_transformer_engine()
    layer = _transformer_engine_layer() if use_transformer_engine else _local_layer()
    layer.submodules.self_attention.submodules.core_attention = CoreAttention  # type: ignore[union-attr]
    # Used where the configuration says so: use_te_activation_func, model/megatron/transformer_config.py.
    layer.submodules.mlp.keywords["submodules"].activation_func = _activation()  # type: ignore[union-attr]
    if recompute is Recompute.elementwise:
        recompute_elementwise(layer)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage):
        layers[-1] = build_last_layer(layer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm(use_transformer_engine))


def _local_layer() -> ModuleSpec:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = _own_norm()
    return layer


def _transformer_engine_layer() -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec()


def _final_norm(use_transformer_engine: bool) -> Any:
    if not use_transformer_engine:
        return _own_norm()
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _activation() -> type[SwiGLU]:
    fused, _ = choose_fused_operators()
    return CompiledSwiGLU if fused else SwiGLU


def _own_norm() -> type[TorchRMSNorm]:
    """Return the norm for layers that are not Transformer Engine's."""
    fused, _ = choose_fused_operators()
    return TorchRMSNorm if fused else RMSNorm
