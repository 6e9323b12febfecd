"""Rules between the settings of a draft adapter's training, checked before a model or a process group exists.

They have the form of those in run.py. What depends on the checkpoint, such as its block size, is checked where it is
read.
"""

import os
from collections.abc import Callable
from itertools import combinations

from conf.rules.optimization import learning_rate_falls
from conf.rules.ranges import Ranges, broken_ranges, read_key
from conf.rules.violations import Violations, refuse_violations
from conf.schema.drafter import DrafterConfig, DraftLoss, ResponseSource

DRAFTER_RANGES = Ranges(
    positive=(
        "adapter.rank",
        "adapter.alpha",
        "objective.verified.draft_temperature",
        "objective.verified.matching_temperature",
        "objective.verified.argmax_temperature",
        "objective.verified.support",
        "responses.prompts",
        "responses.max_new_tokens",
        "responses.prompt_tokens",
        "responses.prompts_per_shard",
        "responses.batch_size",
        "train.steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.sequence_length",
        "train.blocks_per_sequence",
        "optimizer.epsilon",
        "schedule.peak_lr",
        "evaluation.sequences",
        "checkpointing.keep",
        "runtime.loss_chunk_blocks",
        "runtime.log_every_steps",
        "runtime.timeout_minutes",
    ),
    not_negative=(
        "objective.hybrid_rate",
        "objective.verified.matching_weight",
        "objective.verified.matching_rate",
        "objective.verified.argmax_weight",
        "responses.temperature",
        "zero.stage",
        "schedule.final_lr",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "train.seed",
        "evaluation.every_steps",
        "checkpointing.every_steps",
    ),
    zero_to_one=(
        "objective.reach_floor",
        "objective.verified.sampled_share",
        "schedule.warmup_fraction",
        "schedule.decay_fraction",
    ),
    below_one=("optimizer.beta1", "optimizer.beta2"),
    between=("evaluation.share",),
)
HIGHEST_ZERO_STAGE = 3
SHORTEST_BLOCK = 2  # tokens: the seed and one that is drafted


def check_drafter_rules(config: DrafterConfig, world_size: int) -> None:
    """Check `config` for a training on `world_size` ranks.

    Raises ConfigError listing every violated rule.
    """
    rules = [rule(config) for rule in _RULES]
    refuse_violations([broken_ranges(config, DRAFTER_RANGES), *rules, _batch_divides_over_ranks(config, world_size)])


def _names_are_given(config: DrafterConfig) -> Violations:
    for key in ("checkpoint", "data", "run.name", "run.dir"):
        if not read_key(config, key):
            yield f"{key} is empty; give it a value"
    for key in ("heldout", "output", "responses.cache"):
        if read_key(config, key) == "":
            yield f"{key} is empty; leave it out or give a path"


def _folders_differ(config: DrafterConfig) -> Violations:
    """Keep what is written out of what is read, and apart from one another."""
    keys = ("checkpoint", "data", "heldout", "output", "run.dir")
    paths = {key: os.path.abspath(value) for key in keys if (value := read_key(config, key))}
    for first, second in combinations(paths, 2):
        if paths[first] == paths[second]:
            held_out = (first, second) == ("data", "heldout")
            remedy = "heldout=null holds a share of data out" if held_out else "give each a folder of its own"
            yield f"{first} and {second} are both {read_key(config, second)}; {remedy}"


def _drafts_fit_the_sequence(config: DrafterConfig) -> Violations:
    train, block = config.train, config.block_size
    if block is not None and block < SHORTEST_BLOCK:
        yield f"block_size={block} leaves nothing to draft beside the seed; give at least {SHORTEST_BLOCK}"
    elif block is not None and block >= train.sequence_length:
        yield (
            f"train.sequence_length={train.sequence_length} must exceed block_size={block}: a block needs a prompt; "
            "lengthen the sequence or shorten the block"
        )
    if train.blocks_per_sequence >= train.sequence_length:
        yield (
            f"train.blocks_per_sequence={train.blocks_per_sequence} exceeds the anchors of a sequence of "
            f"train.sequence_length={train.sequence_length} tokens; give at most {train.sequence_length - 1}"
        )


def _prompts_fit_the_sequence(config: DrafterConfig) -> Violations:
    responses, length = config.responses, config.train.sequence_length
    if responses.source is ResponseSource.given:
        return
    if responses.prompt_tokens >= length:
        yield (
            f"responses.prompt_tokens={responses.prompt_tokens} leaves no room for a response in "
            f"train.sequence_length={length}; shorten the prompt or lengthen the sequence"
        )
    if responses.source is ResponseSource.sampled and responses.temperature == 0:
        yield "responses.temperature=0 samples nothing; set responses.source=greedy or raise the temperature"


def _verified_loss_has_a_term(config: DrafterConfig) -> Violations:
    verified = config.objective.verified
    if config.objective.loss is DraftLoss.verified and not (verified.matching_weight or verified.argmax_weight):
        yield (
            "objective.verified.matching_weight=0 and objective.verified.argmax_weight=0 leave no loss; give one of "
            "them a positive value"
        )


def _zero_stage_allows_offload(config: DrafterConfig) -> Violations:
    zero = config.zero
    if zero.stage > HIGHEST_ZERO_STAGE:
        yield f"zero.stage={zero.stage} does not exist; choose 0, 1, 2 or {HIGHEST_ZERO_STAGE}"
    if zero.offload_optimizer and zero.stage == 0:
        yield "zero.offload_optimizer=true needs zero.stage of 1 or more; set it or switch this off"
    if zero.offload_parameters and zero.stage != HIGHEST_ZERO_STAGE:
        yield (
            f"zero.offload_parameters=true needs zero.stage={HIGHEST_ZERO_STAGE}, which is {zero.stage}; "
            "set it or switch this off"
        )


def _batch_divides_over_ranks(config: DrafterConfig, world_size: int) -> Violations:
    train = config.train
    together = train.micro_batch_size * world_size
    if train.global_batch_size % together:
        nearest = max(together, train.global_batch_size // together * together)
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{train.micro_batch_size} * {world_size} ranks; use for example train.global_batch_size={nearest}"
        )


_RULES: list[Callable[[DrafterConfig], Violations]] = [
    _names_are_given,
    _folders_differ,
    _drafts_fit_the_sequence,
    _prompts_fit_the_sequence,
    _verified_loss_has_a_term,
    _zero_stage_allows_offload,
    learning_rate_falls,
]
