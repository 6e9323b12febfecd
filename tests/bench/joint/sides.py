"""The reference and our model as modules of the same megatron-core trainer: one data-parallel rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from conf.schema import Objective, RuntimeConfig
from model.megatron import build as model_build
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from model.megatron.tri_mode import TriModeModel
from pretrain.run.model_parallel import distributed_session
from pretrain.step.microbatches import PreparedStep
from pretrain.step.optimizer import wrap_data_parallel
from pretrain.step.schedule import run_schedule
from tests.bench.joint.cases import PARALLEL, RUNTIME, SEED, Case, build_step
from tests.bench.joint.reference import ReferenceModel, build_reference_step

REFERENCE, OURS, AR = "reference", "ours", "ar"


@dataclass(frozen=True)
class Side:
    """A model wrapped for data parallelism, and the step that it is given."""

    model: list[Any]
    step: PreparedStep

    @property
    def module(self) -> TriModeModel:
        """Return the model inside the wrapping."""
        return self.model[0].module

    def clear(self) -> None:
        """Clear the gradients, as a trainer does before every step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()

    def run(self) -> Tensor:
        """Run forward and backward and return the loss sums (pretrain/objective/losses.py)."""
        return run_schedule(self.model, self.step, forward_only=False)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by name, as the trainer leaves them for the optimizer."""
        return {name: weight.main_grad for name, weight in self.module.named_parameters()}  # type: ignore[misc]


def build_side(case: Case, name: str) -> Side:
    """Build one side: reference and ours run the joint step, ar our AR step of the same tokens."""
    original = model_build.TriModeModel
    model_build.TriModeModel = ReferenceModel if name == REFERENCE else original
    try:
        chunks = build_model_chunks(case.model, case.parallel, case.precision, case.runtime.loss_chunk_rows)
    finally:
        model_build.TriModeModel = original
    initialise_weights(chunks, case.model, SEED)
    chunks = [chunk.to(case.device) for chunk in chunks]
    if name == REFERENCE:
        step = build_reference_step(case)
    else:
        step = build_step(case, Objective.ar if name == AR else Objective.joint)
    return Side(wrap_data_parallel(chunks, case.parallel), step)


@contextmanager
def trainer_session(runtime: RuntimeConfig = RUNTIME) -> Iterator[None]:
    """Open megatron-core's groups of one rank."""
    with distributed_session(PARALLEL, runtime, SEED):
        yield
