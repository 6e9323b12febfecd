"""Length, growth, cropping and previews of the prefix cache."""

import pytest
import torch

from model.hf.cache_nemotron_labs_diffusion import PrefixCache


def states(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 4, generator=generator) for length in lengths]


def test_updates_append_and_buffers_double():
    cache, pieces, capacities = PrefixCache(1, capacity=4), states(3, 1, 1, 2, 9), []
    for index, piece in enumerate(pieces):
        keys, values = cache.update(piece, -piece, 0)
        expected = torch.cat(pieces[: index + 1], dim=2)
        assert torch.equal(keys, expected)
        assert torch.equal(values, -expected)
        stored = cache._keys[0]
        assert stored is not None
        capacities.append(stored.shape[2])
    assert capacities == [4, 4, 8, 8, 16]
    assert cache.length == 16


def test_previews_show_new_tokens_without_keeping_them():
    cache, (first, draft, second) = PrefixCache(1), states(3, 5, 2)
    cache.update(first, first, 0)
    for _ in range(2):
        assert torch.equal(cache.preview(draft, -draft, 0)[0], torch.cat((first, draft), dim=2))
        assert cache.length == 3
    assert torch.equal(cache.update(second, second, 0)[0], torch.cat((first, second), dim=2))


def test_cropped_tokens_are_overwritten():
    cache, (first, second) = PrefixCache(2), states(6, 2)
    for layer in range(2):
        cache.update(first, first, layer)
    cache.crop(4)
    assert cache.length == cache.get_seq_length(1) == 4
    assert torch.equal(cache.update(second, second, 1)[1], torch.cat((first[:, :, :4], second), dim=2))


@pytest.mark.parametrize("length", [-1, 4])
def test_a_crop_beyond_what_is_cached_is_refused(length):
    cache, (piece,) = PrefixCache(1), states(3)
    cache.update(piece, piece, 0)
    with pytest.raises(ValueError, match="cache of 3 tokens"):
        cache.crop(length)
