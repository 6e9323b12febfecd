"""What is measured: one sequence with half of its noisy tokens masked; on the CPU through a small model."""

from dataclasses import dataclass, field, replace

import torch

from conf.schema import (
    AttentionBackend,
    Device,
    Dtype,
    ModelConfig,
    Objective,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    RuntimeConfig,
    StageConfig,
)
from data_pipeline.batch import Batch
from data_pipeline.noise import NoisyBatch
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.objective.losses import weigh
from pretrain.run.process_group import choose_device
from pretrain.step.microbatches import Microbatch, PreparedStep
from tests.helpers.objective import ObjectiveInput, apply_objective

BLOCK_SIZE, MASK_TOKEN_ID = 32, 100
MASKING_PROBABILITY = 0.5
PARALLEL = ParallelConfig()
PRECISION = PrecisionConfig(dtype=Dtype.fp32)
RUNTIME = RuntimeConfig(device=Device.cpu, loss_chunk_rows=256)
# 3 % faster at L 2048 and 2 % at L 512 than 256 rows (more gain nothing): weights are read half as often. Their
# softmaxes take 67 MB of 32768 columns; of 131072 they would not fit the memory wanted.
WIDER = replace(RUNTIME, loss_chunk_rows=512)
SEED = 0


SMALL = ModelConfig(
    name="bench",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=0,
)


@dataclass(frozen=True)
class Case:
    """A measured case: a model, a sequence and how the step runs.

    sequence_length: clean tokens. vocab_size: of embedding and head. shape: the model but for its vocabulary.
    precision, runtime, recompute: as a run has them.
    """

    sequence_length: int
    vocab_size: int
    shape: ModelConfig = field(default_factory=lambda: SMALL)
    precision: PrecisionConfig = field(default_factory=lambda: PRECISION)
    runtime: RuntimeConfig = field(default_factory=lambda: RUNTIME)
    recompute: Recompute = Recompute.none

    @property
    def name(self) -> str:
        """Return a short name for tables and files."""
        return f"L {self.sequence_length}, V {self.vocab_size}"

    @property
    def model(self) -> ModelConfig:
        """Return the model with this vocabulary."""
        return replace(self.shape, vocab_size=self.vocab_size)

    @property
    def parallel(self) -> ParallelConfig:
        """Return the parallelism of one rank."""
        return replace(PARALLEL, recompute=self.recompute)

    @property
    def device(self) -> torch.device:
        """Return the device it is measured on."""
        return choose_device(self.runtime.device)


CASES = (Case(512, 32768, runtime=WIDER), Case(512, 131072), Case(2048, 32768, runtime=WIDER))
QUICK_CASES = (Case(256, 4096),)


def build_batch(case: Case) -> NoisyBatch:
    """Build one document of random tokens; exactly half of its noisy tokens are masked."""
    generator = torch.Generator().manual_seed(SEED)
    length = case.sequence_length
    everywhere = torch.ones(1, length, dtype=torch.bool)
    tokens = torch.randint(MASK_TOKEN_ID + 1, case.vocab_size, (1, length), generator=generator)
    batch = Batch(tokens, build_regular_layout(length, BLOCK_SIZE), everywhere, torch.zeros(1, dtype=torch.int64))
    masked = torch.zeros_like(everywhere)
    masked[0, torch.randperm(length, generator=generator)[: int(length * MASKING_PROBABILITY)]] = True
    noisy = torch.where(masked, MASK_TOKEN_ID, tokens)
    return NoisyBatch(batch, noisy, masked, torch.full(tokens.shape, MASKING_PROBABILITY))


def build_input(case: Case, objective: Objective) -> ObjectiveInput:
    """Return the same tokens as the AR or the joint stage sees them."""
    return apply_objective(build_batch(case), objective)


def build_step(case: Case, objective: Objective) -> PreparedStep:
    """Build a global batch of one sequence, as pretrain/step/microbatches.py prepares it."""
    item = build_input(case, objective)
    device = case.device
    plans = PlanBuilder(case.model, AttentionBackend.auto, TORCH_DTYPES[case.precision.dtype], device)
    scored = weigh(item.scored, item.counts, StageConfig(name="joint", objective=objective))
    microbatch = Microbatch(item.tokens.to(device), plans.build(item.layout, item.doubled), scored.to(device))
    return PreparedStep([microbatch], item.counts)
