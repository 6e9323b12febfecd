"""Userbuffers are made with the shape of every forward, taken down at the end, and only when asked for."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from conf.composition.compose import compose_run_config
from conf.schema import RunConfig
from conf.system.errors import UserError
from pretrain.step import userbuffers as module
from pretrain.step.userbuffers import userbuffers

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "experiment=nld_8b_joint"]
ASKED = [*GIVEN, "parallel.overlap_tensor_parallel=true"]


class Engine:
    """Stand in for the parts of transformer_engine.pytorch that are called; remember the calls."""

    UserBufferQuantizationMode = SimpleNamespace(NONE="none", FP8="fp8")

    def __init__(self, failure: str = "") -> None:
        self.calls: list[Any] = []
        self.failure = failure

    def initialize_ub(self, **options: Any) -> None:
        if self.failure:
            raise RuntimeError(self.failure)
        self.calls.append(options)

    def destroy_ub(self) -> None:
        self.calls.append("destroyed")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(module, "check_machine", lambda *_: None)
    package, engine = ModuleType("transformer_engine"), Engine()
    package.pytorch = engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)  # type: ignore[arg-type]
    return engine


def config_of(*overrides: str) -> RunConfig:
    return compose_run_config(list(overrides))


@pytest.mark.parametrize(
    ("overrides", "positions", "mode"),
    [
        (ASKED, 2 * 4096, "none"),
        ([*ASKED, "train.micro_batch_size=2", "precision=fp8"], 4 * 4096, "fp8"),
        ([*ASKED, "stage.objective=ar", "parallel.context_parallel=2"], 2048, "none"),
    ],
)
def test_the_buffers_hold_the_positions_of_a_forward(
    engine: Engine, overrides: list[str], positions: int, mode: str
) -> None:
    with userbuffers(config_of(*overrides)):
        (options,) = engine.calls
        assert options["shape"] == [positions, 4096]
        assert (options["tp_size"], options["quantization_modes"]) == (4, [mode])
        assert options["dtype"] is torch.bfloat16
    assert engine.calls[-1] == "destroyed"


def test_nobody_asks_and_nothing_happens(engine: Engine) -> None:
    with userbuffers(config_of(*GIVEN)):
        pass
    assert engine.calls == []


def test_after_an_error_peers_are_not_waited_for(engine: Engine) -> None:
    with pytest.raises(KeyError), userbuffers(config_of(*ASKED)):
        raise KeyError
    assert "destroyed" not in engine.calls


def test_a_machine_that_cannot_gets_one_message_with_a_remedy(engine: Engine) -> None:
    engine.failure = "no multicast"
    with pytest.raises(UserError, match=r"no multicast.*UB_SKIPMC=1.*overlap_tensor_parallel=false"):
        userbuffers(config_of(*ASKED)).__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_without_transformer_engine_the_key_is_named() -> None:
    with pytest.raises(UserError, match=r"parallel\.overlap_tensor_parallel=true needs Transformer Engine"):
        userbuffers(config_of(*ASKED)).__enter__()
