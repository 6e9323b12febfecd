"""Estimate the bytes on one GPU of each pipeline stage, by component."""

from dataclasses import dataclass

from launch.plan import activations
from launch.plan.rank_shape import FP32, RankShape
from launch.plan.vision import saved_by_tower, tower_backward


@dataclass(frozen=True)
class PipelineStageMemory:
    """Holds the bytes on a GPU of one pipeline stage.

    gradients: fp32 sums. optimizer: fp32 weights and Adam's two moments, this rank's share. activations: saved for the
    backward of all microbatches in flight. logits: of scoring on the last pipeline stage, with the gradients formed
    there. working: what the backward of a layer needs in addition. Logits and working memory never coexist.
    """

    pipeline_stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int

    @property
    def transient(self) -> int:
        """Most bytes of activations, logits and working memory at a time."""
        return self.activations + max(self.logits, self.working)

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        return self.weights + self.gradients + self.optimizer + self.transient


def estimate_memory(shape: RankShape) -> list[PipelineStageMemory]:
    """Estimate every pipeline stage, first to last."""
    return [_estimate_pipeline_stage(shape, pp_rank) for pp_rank in range(shape.parallel.pipeline_parallel)]


def count_pipeline_stage_parameters(shape: RankShape, pp_rank: int) -> int:
    """Count the parameters on a rank of a pipeline stage. Norms are not split over tensor-parallel ranks."""
    model, parallel = shape.model, shape.parallel
    norms = 2 * model.num_layers * model.hidden_size
    count = (model.num_layer_parameters // parallel.tensor_parallel + norms) // parallel.pipeline_parallel
    vocabulary = model.vocab_size // parallel.tensor_parallel * model.hidden_size
    if pp_rank == 0:
        count += vocabulary + model.num_vision_parameters
    if pp_rank == parallel.pipeline_parallel - 1:
        count += vocabulary + model.hidden_size
    return count


def count_chunks_in_flight(shape: RankShape, pp_rank: int) -> int:
    """Count the chunks of microbatches whose activations a pipeline stage holds at most (megatron-core's schedules)."""
    num_stages, virtual = shape.parallel.pipeline_parallel, shape.parallel.virtual_pipeline_parallel
    if virtual == 1:
        return min(num_stages - pp_rank, shape.num_microbatches)
    warmup = 2 * (num_stages - pp_rank - 1) + (virtual - 1) * num_stages
    return min(warmup + 1, shape.num_microbatches * virtual)


def _estimate_pipeline_stage(shape: RankShape, pp_rank: int) -> PipelineStageMemory:
    parameters = count_pipeline_stage_parameters(shape, pp_rank)
    is_last = pp_rank == shape.parallel.pipeline_parallel - 1
    # fp32 weights serve the optimizer as they are; moments and fp32 copies are sharded.
    state = 2 if shape.element_bytes == FP32 else 3
    return PipelineStageMemory(
        pipeline_stage=pp_rank,
        weights=parameters * shape.element_bytes,
        gradients=parameters * FP32,
        optimizer=parameters * FP32 * state // shape.data_ranks,
        activations=_saved_activations(shape, pp_rank),
        logits=activations.scoring(shape) if is_last else 0,
        working=max(activations.layer_backward(shape), _working_of_tower(shape) if pp_rank == 0 else 0),
    )


def _working_of_tower(shape: RankShape) -> int:
    """Return what the tower's backward needs beyond what a microbatch's layers saved, which is freed by then."""
    return tower_backward(shape) - shape.layers_per_chunk * activations.saved_by_layer(shape)


def _saved_activations(shape: RankShape, pp_rank: int) -> int:
    in_flight = count_chunks_in_flight(shape, pp_rank)
    saved = in_flight * shape.layers_per_chunk * activations.saved_by_layer(shape)
    if pp_rank == 0:
        # A microbatch is in flight on the first stage until its first chunk is done.
        saved += -(-in_flight // shape.parallel.virtual_pipeline_parallel) * saved_by_tower(shape)
    if shape.parallel.pipeline_parallel > 1:
        saved += _received_ahead(shape, pp_rank) * shape.stream_bytes
    return saved


def _received_ahead(shape: RankShape, pp_rank: int) -> int:
    """Count hidden states and gradients received before they are used (observed with two pipeline stages)."""
    if shape.parallel.virtual_pipeline_parallel > 1:
        return 2 if pp_rank == 0 else 4
    return 0 if pp_rank == 0 else 1
