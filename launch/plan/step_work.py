"""Count what one optimizer step computes, and what of it is useful (pretrain/costs.py).

Useful are clean positions and noisy ones of live blocks; a forward fills the latter up to one of a few lengths
(model/attention/live.py). MFU counts useful FLOPs, predicted seconds those that are computed.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean

from conf.schema import Objective, RunConfig
from pretrain.costs import StepFlops, count_attended_pairs, count_step_flops

NOISE_LEVELS = 200  # over which expectations are taken


@dataclass(frozen=True)
class SequenceKind:
    """Says what sequences hold. document_tokens: of each document, None: one document per sequence.

    scored_share: part of every document, its end, that may be scored; the rest is a prompt, as in chats.
    image_share: part of all tokens that are features of images, where the model reads any. image_side: features along
    each side of an image.
    """

    document_tokens: int | None = None
    scored_share: float = 1.0
    image_share: float = 0.0
    image_side: int = 24

    def count_patches(self, tokens: int, merge_size: int) -> tuple[int, int]:
        """Return the patches of the images in so many tokens, and the pairs of patches of the same image."""
        patches = round(tokens * self.image_share) * merge_size**2
        return patches, patches * self.image_side**2 * merge_size**2


TEXT = SequenceKind()


@dataclass(frozen=True)
class StepWork:
    """Counts one step of the global batch.

    tokens: clean ones. positions: useful ones of all forwards. computed_positions: of all forwards. attended_pairs:
    (query, key) pairs of useful positions that the mask allows. scored_positions: expected number. flops: useful ones,
    forward and backward. noisy_length: computed noisy positions of a sequence on a context-parallel rank, on average.
    """

    tokens: int
    positions: int
    computed_positions: int
    attended_pairs: int
    scored_positions: float
    flops: StepFlops
    noisy_length: int

    @property
    def total_flops(self) -> float:
        """Useful FLOPs of all parts."""
        return sum(self.flops)

    @property
    def computed_flops(self) -> StepFlops:
        """FLOPs that are computed: layers process computed positions."""
        return self.flops._replace(layers=round(self.flops.layers * self.computed_positions / self.positions))

    @property
    def flops_per_token(self) -> float:
        """Useful FLOPs per clean token."""
        return self.total_flops / self.tokens


def count_work(config: RunConfig, kind: SequenceKind = TEXT) -> StepWork:
    """Count the work of a configuration on sequences of this kind: its expectation over the noise."""
    doubled = config.stage.objective is Objective.joint
    sequences, length, block_size = config.train.global_batch_size, config.data.sequence_length, config.stage.block_size
    documents = split_into_documents(config, kind.document_tokens)
    live_share = fmean(_list_live_shares(config.stage.noise_epsilon, block_size)) if doubled else 0.0
    causal = noisy = 0
    for tokens in documents:
        causal += count_attended_pairs(tokens, block_size, doubled=False)
        prompt = round(tokens * (1 - kind.scored_share))
        noisy += _count_noisy_attended_pairs(tokens, block_size) - _count_noisy_attended_pairs(prompt, block_size)
    attended_pairs = sequences * (causal + round(live_share * noisy))
    tokens = config.tokens_per_step
    positions = tokens + round(tokens * kind.scored_share * live_share)
    noisy_length = _expect_noisy_length(config, len(documents), kind.scored_share) if doubled else 0
    computed = tokens + sequences * noisy_length * config.parallel.context_parallel
    # Nothing precedes a document's first token that could predict it. Masking probabilities are uniform.
    masked = (1 + config.stage.noise_epsilon) / 2 if doubled else 0
    first = len(documents) if kind.scored_share == 1 else 0
    scored = sequences * (length * kind.scored_share * (1 + masked) - first)
    vision = config.model.vision
    patches = (0, 0) if vision is None else kind.count_patches(tokens, vision.merge_size)
    flops = count_step_flops(config.model, positions, attended_pairs, round(scored), *patches)
    return StepWork(tokens, positions, computed, attended_pairs, scored, flops, noisy_length)


def _count_noisy_attended_pairs(num_tokens: int, block_size: int) -> int:
    both, clean = (count_attended_pairs(num_tokens, block_size, doubled) for doubled in (True, False))
    return both - clean


@cache  # for a search asks thousands of times
def _list_live_shares(epsilon: float, block_size: int) -> list[float]:
    """Return the expected share of live blocks at each of NOISE_LEVELS evenly spaced noise levels t, ascending."""
    levels = ((number + 0.5) / NOISE_LEVELS for number in range(NOISE_LEVELS))
    return [1 - (1 - ((1 - epsilon) * level + epsilon)) ** block_size for level in levels]


def _expect_noisy_length(config: RunConfig, num_documents: int, scored_share: float) -> int:
    """Return the expected length of the noisy part of a forward on a rank.

    The fullest sequence of a microbatch sets it. One document has one noise level; many have their mean.
    """
    size, local = config.train.micro_batch_size, config.data.sequence_length // config.parallel.context_parallel
    shares, possible = _list_live_shares(config.stage.noise_epsilon, config.stage.block_size), config.noisy_lengths
    if num_documents > 1:
        return _round_up(possible, local * scored_share * fmean(shares))
    lengths = [_round_up(possible, local * scored_share * share) for share in shares]
    # Of a microbatch's sequences the one with the most: the greatest of `size` draws.
    below = [(number / NOISE_LEVELS) ** size for number in range(NOISE_LEVELS + 1)]
    chances = (above - under for under, above in pairwise(below))
    return round(sum(length * chance for length, chance in zip(lengths, chances, strict=True)))


def _round_up(noisy_lengths: tuple[int, ...], wanted: float) -> int:
    return next((length for length in noisy_lengths if length >= wanted), noisy_lengths[-1])


def split_into_documents(config: RunConfig, document_tokens: int | None) -> list[int]:
    """Return the lengths of a sequence's documents, as attention sees them."""
    length = config.data.sequence_length
    if document_tokens is None or not config.data.isolate_documents:
        return [length]
    whole, rest = divmod(length, document_tokens)
    return [document_tokens] * whole + ([rest] if rest else [])
