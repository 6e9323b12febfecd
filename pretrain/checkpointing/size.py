"""How large a checkpoint will be, from the configuration alone. No torch."""

from conf.schema import Dtype, ModelConfig

# megatron-core's distributed optimizer saves three fp32 numbers per parameter, also where the weights are fp32
# themselves (distrib_optimizer.py, "fully_reshardable": param, exp_avg, exp_avg_sq).
OPTIMIZER_BYTES = 3 * Dtype.fp32.num_bytes
# Files hold a little more than the tensors (.metadata, padding); seen: under 1 % at 1.8M parameters, less above.
FILES_MARGIN = 1.01
# What must be free before one is written, over its tensors; files were up to 3 % larger.
SPACE_MARGIN = 1.05


def compute_checkpoint_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Bytes of one step directory: its tensors and what else lies in their files."""
    return int(compute_tensor_bytes(model, dtype) * FILES_MARGIN)


def compute_tensor_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Bytes of a checkpoint's tensors: weights in `dtype` and the optimizer's fp32 weights and two moments.

    The layout does not matter: every number is written once, whichever ranks hold it.
    """
    return model.num_parameters * (dtype.num_bytes + OPTIMIZER_BYTES)
