"""Compilations are counted per step, and those that come late are named with their reason."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.health import compilations
from pretrain.health.compilations import FIRST_STEPS, CompilationCounter, describe_compilations


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def double(x: Tensor) -> Tensor:
    return 2 * x


def compile_function(function: Callable[..., Tensor] = double) -> Callable[..., Tensor]:
    """Compile up to the code of a backend, which takes a C++ compiler and seconds."""
    return torch.compile(function, dynamic=False, backend="aot_eager")


def test_each_form_of_the_inputs_is_a_kernel_and_known_forms_are_none() -> None:
    counter, compiled = CompilationCounter(), compile_function()
    assert not counter.is_pending
    compiled(torch.ones(3))
    compiled(torch.ones(4))
    assert counter.is_pending and counter.read_step(0) == 0
    assert counter.read_step(1) == 0 and not counter.is_pending
    compiled(torch.ones(3))
    assert not counter.is_pending
    counts = counter.counts
    assert (counts.compiled_kernels, counts.loaded_kernels, counts.recompiled_kernels) == (2, 0, 0)
    assert 0 < counts.compile_seconds < 60
    line = describe_compilations(counter.take_new())
    assert line.startswith("compiled 2 kernels in ") and line.endswith("(double 2)")
    assert counter.take_new() == []


def test_forward_and_backward_are_two_kernels_of_one_function() -> None:
    counter, compiled = CompilationCounter(), compile_function()
    compiled(torch.ones(3, requires_grad=True)).sum().backward()
    counter.read_step(0)
    forward, backward = counter.take_new()
    assert forward.function.startswith("double (tests/pretrain/health/test_compilations.py:")
    assert backward.function == f"{forward.function}, backward"


def test_a_new_form_after_the_first_steps_of_a_process_is_late_and_names_the_input() -> None:
    counter, compiled = CompilationCounter(first_step=1000), compile_function()
    compiled(torch.ones(2))
    assert counter.read_step(1000) == 0
    compiled(torch.ones(3))
    assert counter.read_step(1000 + FIRST_STEPS - 1) == 0
    counter.take_new()
    compiled(torch.ones(7))
    assert counter.read_step(1000 + FIRST_STEPS) == 1
    (late,) = counter.take_new()
    assert late.is_late and "double" in str(late) and "was compiled again in" in str(late)
    assert str(late).endswith("because this changed: tensor 'x' size mismatch at index 0. expected 3, actual 7")


def test_the_first_evaluation_may_compile_whenever_it_comes() -> None:
    counter, compiled = CompilationCounter(), compile_function()
    assert counter.read_step(FIRST_STEPS) == 0
    compiled(torch.ones(3))
    assert counter.read_evaluation() == 0
    compiled(torch.ones(4))
    assert counter.read_evaluation() == 1


def test_no_record_is_lost_however_many_forms_a_step_has() -> None:
    torch._dynamo.utils.set_compilation_metrics_limit(2)  # torch's own is 64
    counter, compiled = CompilationCounter(), compile_function()
    for size in range(2, 7):
        compiled(torch.ones(size))
    counter.read_step(0)
    assert counter.counts.compiled_kernels == 5


def test_kernels_are_saved_once_a_step_compiles_nothing_more() -> None:
    saves: list[int] = []
    cache: Any = SimpleNamespace(save=lambda: saves.append(counter.counts.compiled_kernels), has_file=True)
    counter, compiled = CompilationCounter(cache), compile_function()
    for size in (3, 4):
        compiled(torch.ones(size))
        counter.read_step(0)
    assert saves == []
    for _ in range(3):
        counter.read_step(0)
    assert saves == [2]
    compiled(torch.ones(5))
    counter.read_evaluation()
    counter.save()
    counter.save()
    assert saves == [2, 3]


def test_a_torch_without_these_records_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.delattr(torch._dynamo.utils, "get_compilation_metrics")
    caplog.set_level("WARNING", logger=compilations.logger.name)
    counter = CompilationCounter()
    compile_function()(torch.ones(3))
    assert counter.read_step(0) == 0 and counter.counts.compiled_kernels == 0
    assert "get_compilation_metrics" in caplog.text
