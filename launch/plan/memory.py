"""Bytes on one GPU of each pipeline stage, by component."""

from dataclasses import dataclass

from launch.plan import activations
from launch.plan.shape import FP32, Shape


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a GPU of one pipeline stage.

    weights; gradients (fp32 sums); optimizer (fp32 weights and Adam's two moments, this rank's share). activations:
    kept for the backward of all microbatches in flight. logits: scoring on the last stage, the gradients it forms
    included. working: beside them in the backward of a layer. Logits and working memory take turns.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def passing(self) -> int:
        """Most bytes of activations, logits and working memory at a time."""
        return self.activations + max(self.logits, self.working)

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        return self.weights + self.gradients + self.optimizer + self.passing


def estimate_memory(shape: Shape) -> list[StageMemory]:
    """Every pipeline stage, first to last."""
    return [_estimate_stage(shape, stage) for stage in range(shape.parallel.pipeline_parallel)]


def count_stage_parameters(shape: Shape, stage: int) -> int:
    """Parameters on a rank of a stage. Norms are not split."""
    model, parallel = shape.model, shape.parallel
    norms = 2 * model.num_layers * model.hidden_size
    count = (model.num_layer_parameters // parallel.tensor_parallel + norms) // parallel.pipeline_parallel
    vocabulary = model.vocab_size // parallel.tensor_parallel * model.hidden_size
    if stage == 0:
        count += vocabulary
    if stage == parallel.pipeline_parallel - 1:
        count += vocabulary + model.hidden_size
    return count


def count_chunks_in_flight(shape: Shape, stage: int) -> int:
    """Microbatches, times virtual stages, whose activations a stage holds at most (megatron-core's schedules)."""
    stages, virtual = shape.parallel.pipeline_parallel, shape.parallel.virtual_pipeline_parallel
    if virtual == 1:
        return min(stages - stage, shape.num_microbatches)
    warmup = 2 * (stages - stage - 1) + (virtual - 1) * stages
    return min(warmup + 1, shape.num_microbatches * virtual)


def _estimate_stage(shape: Shape, stage: int) -> StageMemory:
    parameters = count_stage_parameters(shape, stage)
    is_last = stage == shape.parallel.pipeline_parallel - 1
    # With fp32 weights the optimizer's own are a view of them; moments and fp32 copies are sharded.
    state = 2 if shape.element_bytes == FP32 else 3
    return StageMemory(
        stage=stage,
        weights=parameters * shape.element_bytes,
        gradients=parameters * FP32,
        optimizer=parameters * FP32 * state // shape.data_ranks,
        activations=_kept(shape, stage),
        logits=activations.scoring(shape) if is_last else 0,
        working=activations.layer_backward(shape),
    )


def _kept(shape: Shape, stage: int) -> int:
    in_flight = count_chunks_in_flight(shape, stage)
    kept = in_flight * shape.layers_per_chunk * activations.saved_by_layer(shape)
    if shape.parallel.pipeline_parallel > 1:
        kept += _on_their_way(shape, stage) * shape.stream_bytes
    return kept


def _on_their_way(shape: Shape, stage: int) -> int:
    """Hidden states and gradients received ahead of their use (counted on two stages, tests/launch/plan)."""
    if shape.parallel.virtual_pipeline_parallel > 1:
        return 2 if stage == 0 else 4
    return 0 if stage == 0 else 1
