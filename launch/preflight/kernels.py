"""Which implementations the run will use, and why: the trainer's own choices, made here."""

from collections.abc import Iterator

from conf.entry import quiet_libraries
from launch.preflight.findings import Finding, ok, warning
from launch.preflight.subject import Subject


def check_kernels(subject: Subject) -> Iterator[Finding]:
    """Layers, weight gradients and attention. Slower ones than a GPU could have are warnings."""
    quiet_libraries()
    import torch

    from model.spec import choose_gradient_accumulation_fusion, choose_transformer_engine

    has_cuda = torch.cuda.is_available()
    used, reason = choose_transformer_engine()
    yield _judge(f"layers: {'Transformer Engine' if used else 'megatron-core'} ({reason})", used or not has_cuda)
    used, reason = choose_gradient_accumulation_fusion()
    remedy = "" if used or not has_cuda else "; README, GPU set-up, says where to get it"
    yield _judge(f"fused weight gradients: {'on' if used else 'off'} ({reason}){remedy}", used or not has_cuda)
    yield ok(_describe_attention(subject))


def _judge(detail: str, is_best: bool) -> Finding:
    return ok(detail) if is_best else warning(detail)


def _describe_attention(subject: Subject) -> str:
    """Raises UserError for a backend or device that this machine cannot have."""
    from model.attention.plan import PlanBuilder
    from model.transformer_config import TORCH_DTYPES
    from pretrain.process_group import choose_device

    config = subject.config
    device, asked = choose_device(config.runtime.device), config.runtime.attention_backend
    plans = PlanBuilder(config.model, asked, TORCH_DTYPES[config.precision.dtype], device)
    kernel = {"flex": "FlexAttention with a block mask", "split": "dense products over structural pieces"}
    return (
        f"attention: {plans.backend.value}, {kernel[plans.backend.value]} (runtime.attention_backend={asked.value}, "
        f"device {device.type}); the flash-attention package is not used"
    )
