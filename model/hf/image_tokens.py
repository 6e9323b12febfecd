"""The tokens that stand for an image in a prompt; needs the standard library alone.

An image of h x w features is `<|image_start|>`, then h times w `<|image_pad|>` and a `<|image_break|>`, the last of
which is `<|image_end|>`: 1 + h (w + 1) tokens. Features take the place of the pads alone. Chat templates write one
`<|image_start|>` for each image.
"""

from collections.abc import Iterable, Sequence

IMAGE_START, IMAGE_PAD, IMAGE_BREAK, IMAGE_END = 18, 19, 20, 21
IMAGE_TOKENS = {
    "<|image_start|>": IMAGE_START,
    "<|image_pad|>": IMAGE_PAD,
    "<|image_break|>": IMAGE_BREAK,
    "<|image_end|>": IMAGE_END,
}
Grid = tuple[int, int]  # features of an image: height, width


def list_image_tokens(grid: Grid) -> list[int]:
    """List the tokens of an image of `grid` features, 1 + h (w + 1) of them."""
    height, width = grid
    lines = ([IMAGE_PAD] * width + [IMAGE_BREAK]) * height
    return [IMAGE_START, *lines[:-1], IMAGE_END]


def count_image_tokens(grid: Grid) -> int:
    """Count the tokens of an image of `grid` features."""
    height, width = grid
    return 1 + height * (width + 1)


def expand_image_tokens(token_ids: Iterable[int], grids: Sequence[Grid]) -> list[int]:
    """Replace each `<|image_start|>` by all tokens of its image.

    Args:
        token_ids: of a prompt, with one `<|image_start|>` for each image and none of the other image tokens.
        grids: the features of its images in their order.

    Raises:
        ValueError: not one `<|image_start|>` for each image, or images that are expanded already.
    """
    token_ids = list(token_ids)
    if num_others := sum(token in (IMAGE_PAD, IMAGE_BREAK, IMAGE_END) for token in token_ids):
        raise ValueError(
            f"the prompt holds {num_others} tokens of images already (ids {IMAGE_PAD} to {IMAGE_END}): write one "
            "<|image_start|> for each image, the rest is filled in"
        )
    if (num_places := token_ids.count(IMAGE_START)) != len(grids):
        raise ValueError(
            f"the prompt has {num_places} times <|image_start|> and {len(grids)} images: write it once for each image"
        )
    left = iter(grids)
    expanded: list[int] = []
    for token in token_ids:
        expanded += list_image_tokens(next(left)) if token == IMAGE_START else [token]
    return expanded


def check_image_tokens(token_ids: Iterable[int], grids: Sequence[Grid]) -> None:
    """Check that expanded prompts (one after another) hold the tokens of exactly these images. Raises: ValueError."""
    found = [token for token in token_ids if IMAGE_START <= token <= IMAGE_END]
    needed = [token for grid in grids for token in list_image_tokens(grid)]
    if found == needed:
        return
    numbers = [(tokens.count(IMAGE_START), tokens.count(IMAGE_PAD)) for tokens in (found, needed)]
    (places, pads), (images, features) = numbers
    if (places, pads) == (images, features):
        where = "rows of other lengths: the sizes or the order of the images differ"
    else:
        where = f"{places} images with {pads} <|image_pad|>, the images given are {images} with {features} features"
    raise ValueError(
        f"image tokens and images do not match: the prompts hold {where}. Expand one <|image_start|> for each image by "
        "image_sizes, as the processor does"
    )
