"""How large a checkpoint will be, from the configuration alone. No torch."""

from conf.schema import Dtype, ModelConfig

WEIGHT_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
# megatron-core's distributed optimizer saves three fp32 numbers per parameter, also where the weights are fp32
# themselves (distrib_optimizer.py, "fully_reshardable": param, exp_avg, exp_avg_sq).
OPTIMIZER_BYTES = 3 * 4
# Files hold a little more than the tensors (.metadata, padding); seen: under 1 % at 1.8M parameters, less above.
FILES_MARGIN = 1.01


def compute_checkpoint_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Bytes of one step directory: weights in `dtype` and the optimizer's fp32 weights and two moments.

    The layout does not matter: every number is written once, whichever ranks hold it.
    """
    return int(model.num_parameters * (WEIGHT_BYTES[dtype] + OPTIMIZER_BYTES) * FILES_MARGIN)
