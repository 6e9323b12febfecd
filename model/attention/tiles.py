"""Choose tiles, warps and stages of FlexAttention's kernels by device and head width, with the figures that chose them.

A kernel holds one tile of queries or keys and loops over tiles of the others. torch's own backward spills registers to
memory under our masks; the tiles chosen here do not. Which is fastest is for a device to say: `make bench-gpu` takes
its candidates from here. Figures: compiled by torch 2.13 for the joint mask in bf16 with 32 heads over 8
(`make test-kernels` compiles them again and notices what has become worse).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.system.errors import UserError

MASK_BLOCK = 128  # positions and keys of a block of the BlockMask: every tile divides it

Options = dict[str, int]


@dataclass(frozen=True)
class BackwardTiles:
    """Tiles of the backward, which has two loops of the same form: held keys over queries, held queries over keys.

    held, looped: positions or keys of a tile. stages: tiles that are loaded ahead.
    """

    held: int
    looped: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.held} x {self.looped}, {self.warps} warps, {self.stages} stages"

    def kernel_options(self) -> Options:
        """Return them as FlexAttention's kernel_options."""
        return {
            "bwd_BLOCK_M1": self.looped,
            "bwd_BLOCK_N1": self.held,
            "bwd_BLOCK_M2": self.held,
            "bwd_BLOCK_N2": self.looped,
            "bwd_num_warps": self.warps,
            "bwd_num_stages": self.stages,
        }


# By major compute capability and head width; the first is used. Forward: torch's own tiles spill nothing on either.
CANDIDATES: dict[tuple[int, int], tuple[BackwardTiles, ...]] = {
    # H100, H200                             registers, bytes spilled, KiB of shared memory; torch's own: 255, 172, 164
    (9, 128): (
        BackwardTiles(128, 32, warps=8, stages=2),  # 234, 0, 97
        BackwardTiles(128, 32, warps=8, stages=3),  # 245, 0, 114; with packed chats 255, 8
        BackwardTiles(64, 64, warps=8, stages=2),  # 255, 0, 98
    ),
    # B200                                                                                 torch's own: 255, 9560, 196
    (10, 128): (
        BackwardTiles(64, 64, warps=8, stages=2),  # 195, 0, 130
        BackwardTiles(128, 32, warps=8, stages=2),  # 250, 0, 113
        BackwardTiles(128, 32, warps=8, stages=3),  # 252, 0, 130
    ),
}


def choose_backward_tiles(capability: tuple[int, int], head_dim: int) -> BackwardTiles | None:
    """Return the tiles for a device of this compute capability; None: torch's own, nothing better is known."""
    candidates = CANDIDATES.get((capability[0], head_dim))
    return candidates[0] if candidates else None


def choose_kernel_options(query: Tensor) -> dict[str, int | bool] | None:
    """Return FlexAttention's kernel_options for query [B, H, R, D] on its device; None leaves all to torch."""
    if not query.is_cuda:
        return None
    # For fewer positions than a tile torch would take its kernel for decoding, which finds no tiles for some of ours.
    options: dict[str, int | bool] = {"FORCE_USE_FLEX_ATTENTION": True} if query.shape[-2] < MASK_BLOCK else {}
    if query.dtype.itemsize == 2:  # wider numbers would not fit into shared memory
        tiles = choose_backward_tiles(torch.cuda.get_device_capability(query.device), query.shape[-1])
        options |= {} if tiles is None else tiles.kernel_options()
    return options or None


def check_tiles(tiles: BackwardTiles | None, mask_block: int = MASK_BLOCK) -> None:
    """Check that a kernel with these tiles, or torch's, compiles under a BlockMask with blocks of `mask_block`.

    Raises:
        UserError: It would not; torch would say so in the middle of the first step.
    """
    if mask_block % MASK_BLOCK:
        raise UserError(
            f"blocks of {mask_block} in the BlockMask do not compile: the forward's tiles do not divide them. Take a "
            f"multiple of {MASK_BLOCK}"
        )
    if tiles is not None and (mask_block % tiles.held or tiles.held % tiles.looped):
        choices = "; ".join(str(choice) for choices in CANDIDATES.values() for choice in choices)
        raise UserError(
            f"tiles {tiles} do not compile: {tiles.looped} must divide {tiles.held}, and that the {mask_block} of a "
            f"block of the BlockMask. Known to compile: {choices}"
        )
