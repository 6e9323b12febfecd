"""Wraps the model for data parallelism and updates it with megatron-core's mixed-precision AdamW."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    clip_grads,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from conf.schema import Dtype, OptimizerConfig, ParallelConfig, PrecisionConfig, StageConfig
from model.megatron.transformer_config import TORCH_DTYPES
from model.megatron.tri_mode import TriModeModel
from pretrain.step.parts import label_parts, scale_learning_rate, sum_vision_gradients


def wrap_data_parallel(
    chunks: list[TriModeModel], parallel: ParallelConfig, gradients_ready: Callable[[], None] = lambda: None
) -> list[DistributedDataParallel]:
    """Wrap the model so that gradients are summed (not averaged: the loss is normalised globally) in fp32 over ranks.

    gradients_ready: called in every step when this rank has its own gradients, before it waits for those of others.
    """
    settings = build_data_parallel_config(parallel)
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=settings, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    _connect_schedules(wrapped, parallel, gradients_ready)
    if (
        parallel_state.get_data_parallel_world_size(with_context_parallel=True) == 1
        and not parallel.overlap_grad_reduce
    ):
        _leave_out_reduction(wrapped)
    return wrapped


def build_data_parallel_config(parallel: ParallelConfig) -> DistributedDataParallelConfig:
    """Return our configuration in megatron-core's terms; the optimizer is always distributed."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        bucket_size=parallel.bucket_parameters,
        check_for_nan_in_grad=False,  # it would end the run; pretrain/health/guard.py decides
    )


def _leave_out_reduction(wrapped: list[DistributedDataParallel]) -> None:
    """Leave out a reduction over one rank: gloo would copy the whole gradient buffer, twice."""
    for chunk in wrapped:
        for group in chunk.bucket_groups:
            group.start_grad_sync = lambda force_all_reduce=False: None  # type: ignore[method-assign]


def _connect_schedules(
    wrapped: list[DistributedDataParallel], parallel: ParallelConfig, gradients_ready: Callable[[], None]
) -> None:
    """Tell megatron-core's pipeline schedules how to hold back, start and finish gradient reduction."""
    config = wrapped[0].config
    config.finalize_model_grads_func = partial(_finalize_without_averaging, gradients_ready)
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])


def _finalize_without_averaging(
    gradients_ready: Callable[[], None], model: list[Any], num_tokens: Any = None, **options: Any
) -> None:
    """Finish gradients without megatron-core's division by its token count: our weights hold the denominator."""
    gradients_ready()
    finalize_model_grads(model, None, **options)
    sum_vision_gradients(model)


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(
    wrapped: list[Any],
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> MegatronOptimizer:
    """Build AdamW with fp32 main weights and state. The learning rate is set at every step (set_hyperparameters)."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_norm,
        bf16=precision.dtype is Dtype.bf16,
        params_dtype=TORCH_DTYPES[precision.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    _keep_norms_on_device()
    built = get_megatron_optimizer(settings, wrapped, get_standard_config_overrides(settings) | label_parts())
    wrapped[0].config.grad_scale_func = built.scale_loss
    return built


def _keep_norms_on_device() -> None:
    """Replace megatron-core's own norm of gradients, and let it clip by a norm that stays on the device.

    Its own norm asks the device once for every parameter, and without this way to clip once more.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _compute_norm
    if clip_grads.multi_tensor_scale_tensor_impl is None:
        clip_grads.multi_tensor_scale_tensor_impl = _scale


def _compute_norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Return the norm [1] of all tensors of the first list, as Apex's multi_tensor_l2norm does."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0])))[None], None


def _scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: Tensor) -> None:
    """Multiply tensors by factor [1] in place; megatron-core gives the same list as source and destination."""
    torch._foreach_mul_(lists[1], factor.view(()))


def compute_grad_norm(built: MegatronOptimizer) -> Tensor:
    """Return the norm [1] of the step's gradients over all ranks, before clipping; NaN or infinite if any of them is.

    It stays on the device, where megatron-core clips with it.
    """
    built.prepare_grads()
    return torch.as_tensor(built.get_grad_norm()).view(1)


def update_weights(built: MegatronOptimizer, grad_norm: Tensor) -> None:
    """Clip the gradients, of which this is the norm, and update the weights with them.

    megatron-core's ChainedOptimizer.step from where the norm is known; no parameter of ours is clipped by itself.
    """
    clip_norm, parameters = built.config.clip_grad, built.get_parameters()
    if clip_norm > 0 and parameters:
        clip_grads.clip_grad_by_total_norm_fp32(parameters, clip_norm, grad_norm)  # type: ignore[arg-type]
    built.step_with_ready_grads()


def set_hyperparameters(
    built: MegatronOptimizer, optimizer: OptimizerConfig, stage: StageConfig, learning_rate: float
) -> None:
    """Write the configured values into every parameter group, so that overrides hold after a resume too."""
    for group in built.param_groups:
        group["lr"] = learning_rate * scale_learning_rate(group, stage)
        group["weight_decay"] = optimizer.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (optimizer.beta1, optimizer.beta2)
        group["eps"] = optimizer.epsilon


def list_torch_optimizers(built: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold fp32 weights and moments."""
    return [inner.optimizer for inner in getattr(built, "chained_optimizers", [built])]


def prepare_for_loading(built: MegatronOptimizer) -> None:
    """Make torch Adam's state exist before a checkpoint is read into it.

    torch allocates it in the first step, Transformer Engine's Adam at once; megatron-core expects the latter.
    """
    for inner in list_torch_optimizers(built):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if isinstance(inner, torch.optim.Adam) and not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def repair_after_loading(built: MegatronOptimizer) -> None:
    """Give every parameter its own step counter.

    megatron-core's distributed optimizer hands all of them one tensor, which torch Adam then advances once per
    parameter: a silent error in the bias correction.
    """
    for inner in list_torch_optimizers(built):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def accept_step_tensors() -> None:
    """Let the distributed optimizer load states of torch Adam, which hold a `step` it does not look for."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "accepts_step", False):
        return

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> Any:
        return original(self, parameter, {"step": None, **tensors})

    set_states.accepts_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states  # type: ignore[assignment, method-assign]
