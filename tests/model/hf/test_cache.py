"""Lengths, growth and cropping of the prefix cache, with sequences of equal and of different length."""

import pytest
import torch

from model.hf.cache import PrefixCache

CPU = torch.device("cpu")


def states(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 4, generator=generator) for length in lengths]


def write(cache, chunk, keep=None, layers=1):
    """Run a forward over `chunk` [2, 3, N, 4] and return what its last layer sees."""
    cache.begin(chunk.shape[2], CPU)
    for layer in range(layers):
        seen = cache.update(chunk, -chunk, layer)
    cache.advance(chunk.shape[2] if keep is None else keep)
    return seen


def test_updates_append_and_buffers_double():
    cache, chunks, capacities = PrefixCache(1, capacity=4), states(3, 1, 1, 2, 9), []
    for index, chunk in enumerate(chunks):
        keys, values = write(cache, chunk)
        expected = torch.cat(chunks[: index + 1], dim=2)
        assert torch.equal(keys, expected)
        assert torch.equal(values, -expected)
        stored = cache._keys[0]
        assert stored is not None
        capacities.append(stored.shape[2])
    assert capacities == [4, 4, 8, 8, 16]
    assert cache.length == 16


def test_nothing_is_allocated_while_there_is_room():
    cache, (first, *rest) = PrefixCache(1, capacity=32), states(3, 1, 1, 5, 8)
    write(cache, first)
    stored = cache._keys[0]
    assert stored is not None
    for chunk in rest:
        keys, _ = write(cache, chunk)
        assert keys.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def test_drafts_show_new_tokens_without_keeping_them():
    cache, (first, draft, second) = PrefixCache(1), states(3, 5, 2)
    write(cache, first)
    for _ in range(2):
        assert torch.equal(write(cache, draft, keep=0)[0], torch.cat((first, draft), dim=2))
        assert cache.length == 3
    assert torch.equal(write(cache, second)[0], torch.cat((first, second), dim=2))


def test_cropped_tokens_are_overwritten():
    cache, (first, second) = PrefixCache(2), states(6, 2)
    write(cache, first, layers=2)
    cache.crop(4)
    assert cache.length == cache.get_seq_length(1) == 4
    assert torch.equal(write(cache, second, layers=2)[1], -torch.cat((first[:, :, :4], second), dim=2))


@pytest.mark.parametrize("length", [-1, 4])
def test_a_crop_beyond_what_is_cached_is_refused(length):
    cache, (chunk,) = PrefixCache(1), states(3)
    write(cache, chunk)
    with pytest.raises(ValueError, match="cache of 3 tokens"):
        cache.crop(length)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_each_sequence_keeps_its_own_tokens_in_order(fixed_shapes):
    """Two lists are the reference: sequences commit different shares of ten random forwards."""
    cache, generator = PrefixCache(1, capacity=6, fixed_shapes=fixed_shapes), torch.Generator().manual_seed(0)
    sequences = [torch.zeros(3, 0, 4), torch.zeros(3, 0, 4)]
    for _ in range(10):
        num_new = int(torch.randint(1, 6, (), generator=generator))
        chunk = torch.randn(2, 3, num_new, 4, generator=generator)
        lengths = cache.begin(num_new, CPU)
        given = [len(sequences[0][0]), len(sequences[1][0])] if lengths is None else lengths.flatten().tolist()
        assert given in ([sequence.shape[1] for sequence in sequences], [sequences[0].shape[1]])
        keys, values = cache.update(chunk, -chunk, 0)
        assert keys.shape[2] == cache.num_visible
        counts = torch.randint(0, num_new + 1, (2,), generator=generator).tolist()
        for index, count in enumerate(counts):
            expected = torch.cat((sequences[index], chunk[index]), dim=1)
            assert torch.equal(keys[index, :, : expected.shape[1]], expected)
            assert torch.equal(values[index, :, : expected.shape[1]], -expected)
            sequences[index] = expected[:, : sequences[index].shape[1] + count]
        cache.advance(counts)
        lengths_now = [sequence.shape[1] for sequence in sequences]
        assert cache.length == max(lengths_now)
        assert cache.is_uniform == (lengths_now[0] == lengths_now[1])
        assert cache.lengths == (lengths_now[:1] if cache.is_uniform else lengths_now)


def test_fixed_shapes_show_all_slots_after_a_prefix():
    cache, (first, second) = PrefixCache(1, capacity=20, fixed_shapes=True), states(3, 2)
    assert write(cache, first)[0].shape[2] == 3
    keys, _ = write(cache, second)
    assert keys.shape[2] == 20
    assert torch.equal(keys[:, :, :5], torch.cat((first, second), dim=2))
    assert not keys[:, :, 5:].any()
