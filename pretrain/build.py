"""The parts around the model that a Trainer is made of, from the configuration."""

from megatron.core import parallel_state

from conf.schema import RunConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.noise import NoiseSource
from model.attention.plan import PlanBuilder
from pretrain.run.run_data import HELDOUT_SEED, RunData, count_samples
from pretrain.run.run_status import TrainState
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.microbatches import MicrobatchBuilder


def build_loader(config: RunConfig, data: RunData, state: TrainState) -> BatchLoader:
    return BatchLoader(
        data.train,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        config.data.prefetch_steps,
        count_samples(config, state),
    )


def build_microbatch_builder(config: RunConfig, data: RunData, plans: PlanBuilder, split: str) -> MicrobatchBuilder:
    seed = HELDOUT_SEED if split == "heldout" else config.train.seed
    noise = NoiseSource(seed, config.stage.name, split, config.stage.noise_epsilon)
    return MicrobatchBuilder(config.stage, noise, data.tokenizer.mask_token_id, plans)


def build_evaluation(config: RunConfig, data: RunData, plans: PlanBuilder) -> HeldoutEvaluation | None:
    if data.heldout is None:
        return None
    builder = build_microbatch_builder(config, data, plans, "heldout")
    num_sequences = min(config.evaluation.sequences, data.heldout.num_samples_without_repeats)
    return HeldoutEvaluation(data.heldout, builder, num_sequences, config.train.micro_batch_size)
