"""Tiles are chosen by device and width, and what cannot compile is refused (tests/kernels compiles what is chosen)."""

import pytest
import torch

from conf.system.errors import UserError
from model.attention.tiles import (
    CANDIDATES,
    BackwardTiles,
    check_tiles,
    choose_backward_tiles,
    choose_kernel_options,
)


def test_the_first_candidate_of_device_and_width_is_chosen() -> None:
    assert choose_backward_tiles((9, 0), 128) == CANDIDATES[9, 128][0]
    assert choose_backward_tiles((9, 0), 96) is None
    assert choose_backward_tiles((8, 0), 128) is None


def test_options_are_for_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel_options(torch.empty(1, 4, 16, 128, dtype=torch.bfloat16)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    query = FakeQuery(torch.bfloat16)
    assert choose_kernel_options(query) == CANDIDATES[9, 128][0].kernel_options()  # type: ignore[arg-type]
    assert choose_kernel_options(FakeQuery(torch.float32)) is None  # type: ignore[arg-type]
    short = choose_kernel_options(FakeQuery(torch.float32, num_positions=96))  # type: ignore[arg-type]
    assert short == {"FORCE_USE_FLEX_ATTENTION": True}


class FakeQuery:
    """What is asked of a query on a GPU."""

    def __init__(self, dtype: torch.dtype, num_positions: int = 256) -> None:
        self.is_cuda, self.device, self.dtype = True, torch.device("cuda", 0), dtype
        self.shape = (1, 32, num_positions, 128)


@pytest.mark.parametrize("tiles", [tiles for candidates in CANDIDATES.values() for tiles in candidates], ids=str)
def test_every_candidate_fits_the_mask(tiles: BackwardTiles) -> None:
    check_tiles(tiles)


@pytest.mark.parametrize(
    ("tiles", "mask_block", "message"),
    [
        (None, 64, "blocks of 64 .* Take a multiple of 128"),
        (BackwardTiles(96, 32, 8, 2), 128, "96 x 32.* Known to compile: 128 x 32"),
        (BackwardTiles(128, 48, 8, 2), 128, "48 must divide 128"),
    ],
)
def test_what_does_not_compile_is_refused_with_alternatives(
    tiles: BackwardTiles | None, mask_block: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_tiles(tiles, mask_block)
