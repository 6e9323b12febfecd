"""Noise is a pure function of what is being masked."""

import math

import torch

from data_pipeline.batch import Batch, SequenceLayout
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from tests.helpers.packed import pack_chats

MASK = 100
SOURCE = NoiseSource(seed=1, stage="joint", split="train", epsilon=1e-3)


def make_batch(sample_indices: list[int], length: int = 512, document_length: int = 512) -> Batch:
    """Make sequences of documents of equal length, tokens never the mask token."""
    batch_size = len(sample_indices)
    positions = (torch.arange(length) % document_length).repeat(batch_size, 1)
    layout = SequenceLayout(
        document_ids=torch.arange(length).repeat(batch_size, 1) // document_length,
        block_ids=torch.arange(length).repeat(batch_size, 1) // 16,
        position_ids=positions,
        block_padding=torch.zeros(batch_size, length, dtype=torch.bool),
    )
    everywhere = torch.ones(batch_size, length, dtype=torch.bool)
    return Batch(torch.arange(length).repeat(batch_size, 1) % 90, layout, everywhere, torch.tensor(sample_indices))


def test_a_sample_has_the_same_noise_in_every_batch() -> None:
    together = add_noise(make_batch([3, 4, 5]), SOURCE, MASK)
    for row, index in enumerate([3, 4, 5]):
        alone = add_noise(make_batch([index]), SOURCE, MASK)
        assert torch.equal(alone.noisy_tokens[0], together.noisy_tokens[row])
        assert torch.equal(alone.p_mask[0], together.p_mask[row])


def test_seed_stage_split_and_sample_each_change_the_noise() -> None:
    others = [
        (NoiseSource(2, "joint", "train", 1e-3), 3),
        (NoiseSource(1, "sft", "train", 1e-3), 3),
        (NoiseSource(1, "joint", "heldout", 1e-3), 3),
        (SOURCE, 4),
    ]
    reference = add_noise(make_batch([3]), SOURCE, MASK)
    for source, index in others:
        assert not torch.equal(add_noise(make_batch([index]), source, MASK).masked, reference.masked)


def test_exactly_the_masked_tokens_are_replaced() -> None:
    batch = make_batch(list(range(8)))
    noisy = add_noise(batch, SOURCE, MASK)
    assert torch.equal(noisy.noisy_tokens == MASK, noisy.masked)
    assert torch.equal(noisy.noisy_tokens[~noisy.masked], batch.tokens[~noisy.masked])


def test_a_block_is_live_if_it_holds_a_masked_token_that_may_be_scored() -> None:
    chats = [[[5, 20, 3, 18], [7, 10]], [[40], [2, 30]]]
    batch = pack_chats(chats, SequenceForm(128, 16, 16, block_padding_loss=False))
    noisy = add_noise(batch, SOURCE, MASK)
    for sequence, blocks in enumerate(batch.block_ids):
        scored = {int(blocks[s]) for s in range(128) if noisy.masked[sequence, s] and batch.loss_mask[sequence, s]}
        assert 0 < len(scored) < 8
        assert noisy.is_live[sequence].tolist() == [int(block) in scored for block in blocks]


def test_tokens_without_loss_are_never_noised() -> None:
    batch = make_batch(list(range(8)))
    batch.loss_mask[:, 100:300] = False
    assert not add_noise(batch, SOURCE, MASK).masked[:, 100:300].any()


def test_every_document_draws_its_own_level() -> None:
    noisy = add_noise(make_batch([0], document_length=128), SOURCE, MASK)
    assert len({level.item() for level in noisy.p_mask[0]}) == 4


def test_block_padding_is_noised_with_or_without_loss() -> None:
    batches = [
        pack_chats([[[7, 20], [9, 33]]], SequenceForm(128, 16, 16, block_padding_loss=loss)) for loss in (True, False)
    ]
    with_loss, without = (add_noise(batch, SOURCE, MASK) for batch in batches)
    assert torch.equal(with_loss.masked, without.masked)
    assert with_loss.masked[batches[0].block_padding].any()
    allowed = batches[0].loss_mask | batches[0].block_padding
    assert not with_loss.masked[~allowed].any(), "neither context nor padding"


def test_padding_is_never_noised() -> None:
    batch = make_batch([0])
    batch.document_ids[:, 256:] = -1
    assert not add_noise(batch, SOURCE, MASK).masked[:, 256:].any()


def test_levels_are_uniform_and_tokens_are_masked_with_their_probability() -> None:
    noisy = add_noise(make_batch(list(range(400))), SOURCE, MASK)
    levels = noisy.p_mask[:, 0]
    assert levels.min() >= 1e-3
    assert abs(levels.mean() - 0.5) < 4 / math.sqrt(12 * 400)
    share = noisy.masked.float().mean(1)
    assert ((share - levels).abs() < 5 * (levels * (1 - levels) / 512).sqrt() + 1e-6).float().mean() > 0.99


def test_a_sequence_of_padding_alone_has_no_noise() -> None:
    batch = make_batch([0, 1])
    batch.document_ids[1] = -1
    masked = add_noise(batch, SOURCE, MASK).masked
    assert masked[0].any() and not masked[1].any()
