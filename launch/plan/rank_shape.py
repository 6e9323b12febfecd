"""Derive one rank's share of a run, from which every estimate starts."""

from dataclasses import dataclass
from functools import cached_property

from conf.rules.layout import data_parallel_size, num_microbatches
from conf.schema import AttentionBackend, Device, Dtype, ModelConfig, ParallelConfig, RunConfig, VisionPrecision
from launch.plan.step_work import TEXT, SequenceKind

FP32 = Dtype.fp32.num_bytes  # bytes per element of gradients, optimizer state and statistics


@dataclass(frozen=True)
class Kernels:
    """Names the implementation of the layers, which decides what is saved for the backward pass.

    attention: flex or cpu. transformer_engine: Transformer Engine's layers, otherwise megatron-core's own.
    """

    attention: AttentionBackend
    transformer_engine: bool


GPU_KERNELS = Kernels(AttentionBackend.flex, transformer_engine=True)
PLAIN_GPU_KERNELS = Kernels(AttentionBackend.flex, transformer_engine=False)
CPU_KERNELS = Kernels(AttentionBackend.cpu, transformer_engine=False)


@dataclass(frozen=True)
class RankShape:
    """Describes one rank's share of a run.

    element_bytes: of weights and activations. micro_batch_size: sequences per forward. num_microbatches: per rank and
    step. noisy_length: noisy positions of a sequence on a rank, of whole forwards or as many as live blocks take.
    num_scored_positions: of a microbatch on a rank, at most: with every token scored and masked. scored_chunk_size:
    scored positions whose logits the head holds at a time. num_image_features: of a microbatch's images, on all ranks.
    image_side: features along each side of an image. vision: what the vision tower computes in.
    """

    model: ModelConfig
    parallel: ParallelConfig
    kernels: Kernels
    element_bytes: int
    data_parallel: int
    num_microbatches: int
    micro_batch_size: int
    sequence_length: int
    block_size: int
    noisy_length: int
    num_scored_positions: int
    scored_chunk_size: int
    num_image_features: int = 0
    image_side: int = 1
    vision: VisionPrecision = VisionPrecision.fp32

    @cached_property
    def local_length(self) -> int:
        """Clean tokens of a sequence on a rank."""
        return self.sequence_length // self.parallel.context_parallel

    @cached_property
    def num_positions(self) -> int:
        """Positions of a forward on a rank: its tokens, and noisy ones."""
        return self.micro_batch_size * (self.local_length + self.noisy_length)

    @cached_property
    def num_key_positions(self) -> int:
        """Positions whose keys a rank's attention sees: its noisy ones, and the clean ones of whole sequences."""
        return self.micro_batch_size * (self.sequence_length + self.noisy_length)

    @cached_property
    def data_ranks(self) -> int:
        """Data-parallel times context-parallel ranks, which hold the same weights."""
        return self.data_parallel * self.parallel.context_parallel

    @cached_property
    def num_stream_positions(self) -> int:
        """Positions of the residual stream on a rank."""
        degree = self.parallel.tensor_parallel if self.parallel.sequence_parallel else 1
        return self.num_positions // degree

    @cached_property
    def layers_per_chunk(self) -> int:
        """Layers of one model chunk: of a pipeline stage, or of each of its virtual stages."""
        return self.model.num_layers // (self.parallel.pipeline_parallel * self.parallel.virtual_pipeline_parallel)

    @cached_property
    def stream_bytes(self) -> int:
        """Bytes of a microbatch's residual stream on a rank, which is what pipeline stages send."""
        return self.num_stream_positions * self.model.hidden_size * self.element_bytes


def build_rank_shape(
    config: RunConfig, num_gpus: int, kernels: Kernels | None = None, kind: SequenceKind = TEXT
) -> RankShape:
    """Build the shape of the longest forwards of a configuration that its rules allow on `num_gpus` ranks.

    kernels: None: those that a run on this device would choose, Transformer Engine's on a GPU. kind: of the sequences,
    which says how many images they hold.
    """
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return RankShape(
        model=config.model,
        parallel=config.parallel,
        kernels=kernels or (CPU_KERNELS if config.runtime.device is Device.cpu else GPU_KERNELS),
        element_bytes=config.precision.dtype.num_bytes,
        data_parallel=data_parallel_size(config, num_gpus),
        num_microbatches=num_microbatches(config, num_gpus),
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        block_size=config.stage.block_size,
        noisy_length=max(config.noisy_lengths, default=0),
        num_scored_positions=config.positions_per_forward,
        scored_chunk_size=config.runtime.loss_chunk_rows,
        num_image_features=round(tokens * kind.image_share) if config.model.vision else 0,
        image_side=kind.image_side,
        vision=config.precision.vision,
    )
