"""A process sees a device that is not there; what stands in the way is said in one line."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from launch.simulate import fake_device
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import fake_cuda_environment, find_obstacle, pretend
from launch.simulate.hooks import MissingHookError, find_hook, list_hooks, replace_hook
from tests.kernels.processes import find_reason_to_skip

ROOT = Path(__file__).parents[3]
needs_device = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
SHOW = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import pretend
{before}
pretend(KINDS["b200"])
with FakeTensorMode():
    x = torch.ones(3, device="cuda", requires_grad=True)
    (2 * x).sum().backward()
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), x.grad.device)
"""


def run_in_environment(before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SHOW.format(before=before)]
    with fake_cuda_environment(KINDS["b200"]) as environment:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@needs_device
def test_a_process_sees_one_device_of_the_kind_and_differentiates_on_it() -> None:
    done = run_in_environment()
    assert done.stdout == "NVIDIA B200 (10, 0) cuda:0\n", done.stderr


@needs_device
def test_a_hook_that_is_gone_is_named() -> None:
    done = run_in_environment("del torch.cuda.get_device_name")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingHookError: torch.cuda:get_device_name is gone in torch 2." in last
    assert ", triton 3." in last


@needs_device
@pytest.mark.parametrize("hook", ["torch.no_such_module:name", "torch.cuda:no_such_name", "torch.cuda:Event.no.name"])
def test_missing_modules_classes_and_names_are_missing_hooks(hook: str) -> None:
    for use in (find_hook, lambda name: replace_hook(name, None)):
        with pytest.raises(MissingHookError, match=f"^{hook} is gone in torch "):
            use(hook)


@needs_device
def test_every_hook_is_there_in_the_versions_that_are_asked_for() -> None:
    hooks = list_hooks(KINDS["h100"])
    assert len(hooks) > 30
    for hook in hooks:
        find_hook(hook)


def test_outside_of_the_environment_nothing_is_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(RuntimeError, match="start the process in it"):
        pretend(KINDS["h100"])


def test_without_a_compiler_or_with_a_torch_for_cpus_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("torch.version"), "cuda", None)
        assert str(find_obstacle()).startswith("torch is a build for CPUs alone")
        with pytest.raises(RuntimeError, match="torch is a build for CPUs"), fake_cuda_environment(KINDS["b200"]):
            pass
    monkeypatch.setattr(importlib.import_module("torch.version"), "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "no_such_compiler")
    assert str(find_obstacle()).startswith("no C compiler for cuda_stub.c")
    assert "\n" not in str(find_obstacle())


@needs_device
def test_a_stub_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.c").write_text("int broken(void) { return missing; }")
    monkeypatch.setattr(fake_device, "STUB", tmp_path / "broken.c")
    with pytest.raises(RuntimeError, match=r"does not compile broken\.c"), fake_cuda_environment(KINDS["b200"]):
        pass
