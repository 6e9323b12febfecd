"""Pictures that decode have the grid that training finds, whatever is unusual about them; the others are left out."""

import warnings

import pytest

from data_pipeline.images.check import check_image
from data_pipeline.images.sources import UnusableImage
from model.hf.image_processing_nemotron_labs_diffusion_vlm import encode_image
from tests.helpers.pictures import UNUSABLE, USABLE


@pytest.mark.parametrize("name", USABLE)
def test_a_picture_that_decodes_has_its_grid_and_what_is_done_to_it(name: str) -> None:
    data, grid, fixes = USABLE[name]
    checked = check_image(data)
    assert (checked.grid, set(checked.fixes)) == (grid, fixes)
    assert encode_image(data).shape == (3, 28 * grid[0], 28 * grid[1])


@pytest.mark.parametrize("name", [name for name in UNUSABLE if name != "empty"])
def test_a_picture_that_does_not_decode_has_a_reason_and_makes_no_noise(name: str) -> None:
    data, reason = UNUSABLE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnusableImage) as raised:
            check_image(data)
    assert raised.value.reason == reason
    assert raised.value.detail and "object at" not in raised.value.detail
