"""Images are dealt to ranks by their work, and their features find the places of their tokens."""

import pytest
import torch

from conf.schema import VisionConfig
from conf.system.errors import UserError
from model.hf.image_tokens import IMAGE_PAD, Grid, list_image_tokens
from pretrain.step.images import deal_images, find_features

GRIDS: list[Grid] = [(1, 2), (3, 2), (2, 2)]
TEXT = 200


def lay_out_tokens(*sequences: list[Grid]) -> torch.Tensor:
    """Return [B, 32] tokens: text, images with text between them, text."""
    lines = []
    for grids in sequences:
        line = [TEXT]
        for grid in grids:
            line += [*list_image_tokens(grid), TEXT]
        lines.append(line + [TEXT] * (32 - len(line)))
    return torch.tensor(lines)


def test_features_take_the_places_of_their_tokens_in_the_order_of_gathering() -> None:
    tokens = lay_out_tokens(GRIDS[:2], GRIDS[2:])
    found = find_features(tokens, tokens, [1, 0, 1], GRIDS)
    assert torch.equal(found >= 0, tokens == IMAGE_PAD)
    # Rank 0 computes image 1, of six features; then come those of rank 1, images 0 and 2.
    assert found[found >= 0].tolist() == [6, 7, *range(6), *range(8, 12)]


def test_both_halves_get_features_but_not_where_a_token_is_masked() -> None:
    clean = lay_out_tokens(GRIDS[:1])
    noisy = clean.clone()
    noisy[0, 2] = 100
    found = find_features(torch.cat([noisy, clean], dim=1), clean, [0], GRIDS[:1])
    assert found[0, 32:][clean[0] == IMAGE_PAD].tolist() == [0, 1]
    assert found[0, :32][clean[0] == IMAGE_PAD].tolist() == [-1, 1]


def test_without_images_no_token_gets_a_feature() -> None:
    tokens = lay_out_tokens([])
    assert (find_features(tokens, tokens, [], []) == -1).all()


def test_image_tokens_without_images_are_refused() -> None:
    tokens = lay_out_tokens(GRIDS)
    with pytest.raises(UserError, match=r"12 image tokens \(id 19\) for 2 features of 1 images"):
        find_features(tokens, tokens, [0], GRIDS[:1])


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_no_rank_has_more_work_than_its_share_and_the_largest_image(num_ranks: int) -> None:
    torch.manual_seed(0)
    grids = [(int(height), int(width)) for height, width in torch.randint(1, 51, (40, 2))]
    ranks = deal_images(grids, num_ranks, VisionConfig())
    loads = [sum(h * w for (h, w), rank in zip(grids, ranks, strict=True) if rank == r) for r in range(num_ranks)]
    total, largest = sum(loads), max(h * w for h, w in grids)
    assert set(ranks) == set(range(num_ranks))
    assert max(loads) <= total / num_ranks + largest
    assert ranks == deal_images(grids, num_ranks, VisionConfig())
