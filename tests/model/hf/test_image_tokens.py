"""The tokens that stand for images in a prompt."""

import pytest

from model.hf.image_tokens import check_image_tokens, count_image_tokens, expand_image_tokens, list_image_tokens


def test_an_image_is_a_start_and_lines_of_pads_with_breaks_and_an_end():
    assert list_image_tokens((2, 3)) == [18, 19, 19, 19, 20, 19, 19, 19, 21]
    assert list_image_tokens((1, 1)) == [18, 19, 21]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (50, 50)])
def test_it_has_1_plus_h_times_w_plus_1_tokens(grid):
    height, width = grid
    assert len(list_image_tokens(grid)) == count_image_tokens(grid) == 1 + height * (width + 1)


def test_each_start_is_expanded_by_its_own_image():
    expanded = expand_image_tokens([1, 18, 5, 18], [(1, 2), (2, 1)])
    assert expanded == [1, 18, 19, 19, 21, 5, 18, 19, 20, 19, 21]
    check_image_tokens(expanded, [(1, 2), (2, 1)])
    assert expand_image_tokens([1, 5], []) == [1, 5]


def test_images_and_starts_must_be_equally_many():
    with pytest.raises(ValueError, match=r"has 1 times <\|image_start\|> and 2 images: write it once for each image"):
        expand_image_tokens([1, 18], [(1, 2), (2, 1)])


def test_a_prompt_is_expanded_once():
    with pytest.raises(ValueError, match=r"holds 2 tokens of images already \(ids 19 to 21\)"):
        expand_image_tokens(list_image_tokens((1, 1)), [(1, 1)])


@pytest.mark.parametrize("grids", [[(2, 1), (1, 2)], [(1, 2)], [(1, 2), (2, 1), (1, 1)], [(1, 2), (1, 2)], []], ids=str)
def test_expanded_prompts_must_hold_exactly_the_images(grids):
    expanded = expand_image_tokens([1, 18, 5, 18], [(1, 2), (2, 1)])
    with pytest.raises(ValueError, match="image tokens and images do not match"):
        check_image_tokens(expanded, grids)
