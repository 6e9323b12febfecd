"""How large a checkpoint will be, from the configuration alone. No torch."""

from conf.schema import Dtype, ModelConfig

WEIGHT_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
# megatron-core's distributed optimizer saves three fp32 numbers per parameter, also where the weights are fp32
# themselves (distrib_optimizer.py, "fully_reshardable": param, exp_avg, exp_avg_sq).
OPTIMIZER_BYTES = 3 * 4
# Files hold a little more than the tensors (.metadata, padding); seen: under 1 % at 1.8M parameters, less above.
FILES_MARGIN = 1.01


def count_model_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model: layers, norms, embedding and the untied head."""
    attention = model.hidden_size * 2 * (model.query_width + model.key_value_width)
    layer = attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size
    return model.num_layers * layer + model.hidden_size + 2 * model.vocab_size * model.hidden_size


def compute_checkpoint_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Bytes of one step directory: weights in `dtype` and the optimizer's fp32 weights and two moments.

    The layout does not matter: every number is written once, whichever ranks hold it.
    """
    return int(count_model_parameters(model) * (WEIGHT_BYTES[dtype] + OPTIMIZER_BYTES) * FILES_MARGIN)
