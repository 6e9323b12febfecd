"""The numbers of a configuration on a number of GPUs that every estimate starts from."""

from dataclasses import dataclass
from functools import cached_property

from conf.rules.layout import data_parallel_size, num_microbatches
from conf.schema import AttentionBackend, Device, Dtype, ModelConfig, Objective, ParallelConfig, RunConfig

FP32 = Dtype.fp32.num_bytes  # of gradients, optimizer state and statistics


@dataclass(frozen=True)
class Kernels:
    """What computes the layers: it decides what is kept for the backward pass.

    attention: flex or split. transformer_engine: its layers, else megatron-core's own.
    """

    attention: AttentionBackend
    transformer_engine: bool


GPU = Kernels(AttentionBackend.flex, transformer_engine=True)
CPU = Kernels(AttentionBackend.split, transformer_engine=False)


@dataclass(frozen=True)
class Shape:
    """One rank's share of a run.

    element_bytes: of weights and activations. micro_batch_size: sequences of a forward. num_microbatches: of a rank's
    step. doubled: rows are [noisy | clean]. scored_rows: of a microbatch on a rank at most, with every token scored and
    masked. chunk_rows: rows of the head's logits at a time.
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
    doubled: bool
    scored_rows: int
    chunk_rows: int

    @cached_property
    def local_length(self) -> int:
        """Tokens of a sequence on a rank."""
        return self.sequence_length // self.parallel.context_parallel

    @cached_property
    def rows(self) -> int:
        """Rows of a forward on a rank: its tokens once, or twice where sequences are doubled."""
        return self.micro_batch_size * self.local_length * (2 if self.doubled else 1)

    @cached_property
    def key_rows(self) -> int:
        """Rows of keys that a rank's attention sees: its noisy ones, and the clean ones of whole sequences."""
        return self.micro_batch_size * (self.sequence_length + (self.local_length if self.doubled else 0))

    @cached_property
    def data_ranks(self) -> int:
        """Ranks that hold the same weights: data and context parallel ones."""
        return self.data_parallel * self.parallel.context_parallel

    @cached_property
    def stream_rows(self) -> int:
        """Rows of the residual stream on a rank."""
        return self.rows // self.parallel.tensor_parallel if self.parallel.sequence_parallel else self.rows

    @cached_property
    def layers_per_chunk(self) -> int:
        """Layers of one model chunk: of a stage, or of each of its virtual stages."""
        return self.model.num_layers // (self.parallel.pipeline_parallel * self.parallel.virtual_pipeline_parallel)

    @cached_property
    def stream_bytes(self) -> int:
        """The residual stream of a microbatch on a rank; what pipeline stages hand on."""
        return self.stream_rows * self.model.hidden_size * self.element_bytes


def build_shape(config: RunConfig, num_gpus: int) -> Shape:
    """`config`, which its rules allow on `num_gpus` ranks."""
    return Shape(
        model=config.model,
        parallel=config.parallel,
        kernels=CPU if config.runtime.device is Device.cpu else GPU,
        element_bytes=config.precision.dtype.num_bytes,
        data_parallel=data_parallel_size(config, num_gpus),
        num_microbatches=num_microbatches(config, num_gpus),
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        block_size=config.stage.block_size,
        doubled=config.stage.objective is Objective.joint,
        scored_rows=config.positions_per_forward,
        chunk_rows=config.runtime.loss_chunk_rows,
    )
