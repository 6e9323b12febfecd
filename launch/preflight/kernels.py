"""Which implementations the run will use, and why: the trainer's own choices, made here."""

import importlib.util
from collections.abc import Iterator

from conf.schema import AttentionBackend
from conf.system.entry import quiet_libraries
from launch.preflight.findings import Finding, ok, warning
from launch.preflight.subject import Subject

KERNELS = {
    AttentionBackend.flex: "FlexAttention with a block mask",
    AttentionBackend.split: "dense products over structural pieces",
}


def check_kernels(subject: Subject) -> Iterator[Finding]:
    """Layers, weight gradients and attention. Slower ones than a GPU could have are warnings.

    Raises UserError for what this machine lacks of what the configuration asks for.
    """
    quiet_libraries()
    import torch

    from model.megatron.kernels import (
        check_machine,
        check_packages,
        choose_gradient_accumulation_fusion,
        choose_transformer_engine,
    )

    has_cuda = torch.cuda.is_available()
    if not has_cuda and not subject.is_cpu_run:
        check_packages(subject.config.parallel, subject.config.precision)  # the nodes have this environment
        yield warning(
            f"not known without a CUDA device. With one: {_describe_packages()}; attention: {_name(_guess(subject))}"
        )
        return
    check_machine(subject.config.parallel, subject.config.precision)
    used, reason = choose_transformer_engine()
    yield _judge(f"layers: {'Transformer Engine' if used else 'megatron-core'} ({reason})", used or not has_cuda)
    used, reason = choose_gradient_accumulation_fusion()
    remedy = "" if used or not has_cuda else "; README, GPU set-up, says where to get it"
    yield _judge(f"fused weight gradients: {'on' if used else 'off'} ({reason}){remedy}", used or not has_cuda)
    yield ok(_describe_attention(subject))


def _describe_packages() -> str:
    """What this environment would bring to a machine with devices."""
    from model.megatron.kernels import APEX_EXTENSION

    there = {name: importlib.util.find_spec(name) is not None for name in ("transformer_engine", APEX_EXTENSION)}
    layers = (
        "Transformer Engine" if there["transformer_engine"] else "megatron-core (transformer_engine is not installed)"
    )
    fused = "on" if any(there.values()) else f"off (neither transformer_engine nor {APEX_EXTENSION} is found)"
    return f"layers: {layers}; fused weight gradients: {fused}"


def _judge(detail: str, is_best: bool) -> Finding:
    return ok(detail) if is_best else warning(detail)


def _describe_attention(subject: Subject) -> str:
    """Raises UserError for a backend or device that this machine cannot have."""
    from model.attention.plan import PlanBuilder
    from model.megatron.transformer_config import TORCH_DTYPES
    from pretrain.run.process_group import choose_device

    config = subject.config
    device, asked = choose_device(config.runtime.device), config.runtime.attention_backend
    plans = PlanBuilder(config.model, asked, TORCH_DTYPES[config.precision.dtype], device)
    return (
        f"attention: {_name(plans.backend)} (runtime.attention_backend={asked.value}, device {device.type}); the "
        "flash-attention package is not used"
    )


def _guess(subject: Subject) -> AttentionBackend:
    """The backend on a CUDA device."""
    asked = subject.config.runtime.attention_backend
    return AttentionBackend.flex if asked is AttentionBackend.auto else asked


def _name(backend: AttentionBackend) -> str:
    return f"{backend.value}, {KERNELS[backend]}"
