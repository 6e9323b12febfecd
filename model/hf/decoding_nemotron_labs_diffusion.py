"""All modes behind one function."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .autoregressive_nemotron_labs_diffusion import decode_ar
from .block_diffusion_nemotron_labs_diffusion import decode_block_diffusion
from .options_nemotron_labs_diffusion import DecodeOptions
from .quadratic_nemotron_labs_diffusion import decode_quadratic_speculation
from .session_nemotron_labs_diffusion import DecodeResult
from .speculation_nemotron_labs_diffusion import decode_linear_speculation

DECODERS: dict[str, Callable[..., DecodeResult]] = {
    "ar": decode_ar,
    "block_diffusion": decode_block_diffusion,
    "linear": decode_linear_speculation,
    "quadratic": decode_quadratic_speculation,
}
MODES = tuple(DECODERS)


def decode(
    model: Any, mode: str, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """Decode prompt_ids [B, P] in one of MODES; attention_mask [B, P], zero on left padding.

    Raises:
        ValueError: an unknown mode, or prompts or options that cannot be decoded.
    """
    if mode not in DECODERS:
        raise ValueError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
    return DECODERS[mode](model, prompt_ids, options, attention_mask)
