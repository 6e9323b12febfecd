"""Decisions: log-probabilities of candidate tokens at the masked positions of a canvas, in one forward.

Shapes: B sequences, P tokens of the longest prompt, C tokens of a canvas, M masks in it, K candidates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_mask import make_canvas_layout
from .cache import CachedModel
from .options import DecodeOptions, check_options, resolve_block_length, resolve_mask_token_id
from .session import PromptBatch, prepare_prompts

TokenIds = Tensor | Sequence[Any]


@torch.no_grad()
def score_masked_tokens(
    model: Any,
    prompt_ids: Tensor,
    canvas: TokenIds,
    candidates: TokenIds,
    block_length: int | None = None,
    *,
    attention_mask: Tensor | None = None,
    **images: Tensor | None,
) -> Tensor:
    """Compute log-probabilities of candidates at the masks of a canvas that follows the prompt, in one forward.

    The prompt is encoded causally, as in decoding. The canvas is a block of given tokens and mask tokens, which see the
    prompt and each other both ways. Each mask is predicted at its own position, also the first: no AR seed is put
    there. Masks are predicted independently of each other, so the log-probabilities of a text of several tokens may be
    added, but are those of its tokens taken one by one. The mask token has no probability; all other tokens share it.
    A draft adapter, if attached, is not used: as in block diffusion, nothing verifies what is predicted.

    Args:
        model: a NemotronLabsDiffusionModel.
        prompt_ids: [B, P].
        canvas: [B, C] token ids, or [C] for all prompts, with the config's mask_token_id where candidates are scored.
            Every sequence has the same number of masks, anywhere in its canvas.
        candidates: token ids, [K] for all masks, [B, K] for all masks of a sequence, or [B, M, K] for each mask.
        block_length: tokens of the longest canvas; None takes the config's block_size. In training tokens see each
            other both ways within blocks of that size alone: what comes before the first mask fits into the prompt.
        attention_mask: [B, P], zero on left padding.
        images: pixel_values and image_sizes of a prompt with images, as the model's embed_prompt takes them.

    Returns:
        Natural logarithms [B, M, K], masks in the order of the canvas; fp32, of a float64 model float64.

    Raises:
        ValueError: prompts that cannot be decoded; a canvas without masks, with unequal numbers of them, longer than a
            block or than the positions left; no candidates, or ids that cannot be predicted; shapes that do not fit.
    """
    config, mask_token_id = model.config, resolve_mask_token_id(model.config)
    options = DecodeOptions(block_length=block_length)
    check_options(config, options)
    embeds = model.embed_prompt(prompt_ids, attention_mask, **images)
    prompt = prepare_prompts(model, prompt_ids, attention_mask, embeds, mask_token_id=mask_token_id, max_new_tokens=0)
    tokens = _read_canvas(canvas, prompt, config.vocab_size)
    _check_length(config, tokens.shape[1], resolve_block_length(config, options), prompt)
    masks = _find_masks(tokens, mask_token_id)
    chosen = _read_candidates(candidates, masks, config.vocab_size, mask_token_id)
    capacity = prompt.tokens.shape[1] + tokens.shape[1]
    logits = _predict(CachedModel(model, capacity, mask_token_id, prompt.embeddings), prompt, tokens, masks)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).gather(-1, chosen)


def _predict(model: CachedModel, prompt: PromptBatch, canvas: Tensor, masks: Tensor) -> Tensor:
    """Return logits [B, M, vocab] at the places `masks` [B, M] of canvas [B, C]."""
    lengths = torch.tensor(prompt.lengths, device=model.device)[:, None]
    slots = lengths + torch.arange(canvas.shape[1], device=model.device)
    # A canvas follows its own prompt, over the padding of a shorter one; what comes after it is seen by nobody.
    tokens = torch.cat((prompt.tokens, canvas), dim=1).scatter(1, slots, canvas)
    layout = make_canvas_layout(prompt.lengths, canvas.shape[1], model.device)
    hidden = model.encode("decide", tokens, layout)
    return model.project(hidden.gather(1, (lengths + masks)[..., None].expand(-1, -1, hidden.shape[2])))


def _read_ids(name: str, ids: TokenIds, device: torch.device, vocab_size: int) -> Tensor:
    """Return token ids of the vocabulary as an int64 tensor of any shape."""
    try:
        tokens = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be token ids in a tensor, or in lists of equal length") from None
    if tokens.numel() == 0:
        raise ValueError(f"{name} is empty {list(tokens.shape)}: give at least one token id")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids, got {tokens.dtype}")
    low, high = (int(limit) for limit in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} holds id {low if low < 0 else high}, the vocabulary is 0..{vocab_size - 1}")
    return tokens.long()


def _read_canvas(canvas: TokenIds, prompt: PromptBatch, vocab_size: int) -> Tensor:
    """Return the canvas of every prompt, [B, C]."""
    batch = len(prompt.lengths)
    tokens = _read_ids("canvas", canvas, prompt.tokens.device, vocab_size)
    if tokens.dim() not in (1, 2) or (tokens.dim() == 2 and len(tokens) != batch):
        raise ValueError(f"canvas is {list(tokens.shape)}: give [{batch}, length], or [length] for all prompts")
    return tokens.expand(batch, -1)


def _check_length(config: Any, length: int, block_length: int, prompt: PromptBatch) -> None:
    if length > block_length:
        raise ValueError(
            f"canvas has {length} tokens, but within a block only {block_length} see each other both ways: move given "
            "tokens before its first mask to the prompt, or give a longer block_length"
        )
    longest, limit = max(prompt.lengths), config.max_position_embeddings
    if longest + length > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and a canvas of {length} exceed the model's {limit} positions: shorten one"
        )


def _find_masks(canvas: Tensor, mask_token_id: int) -> Tensor:
    """Return where the masks of canvas [B, C] are, [B, M]."""
    is_mask = canvas == mask_token_id
    counts: list[int] = is_mask.sum(1).tolist()
    if min(counts) == 0:
        raise ValueError(
            f"canvas {counts.index(0)} holds no mask token (id {mask_token_id}): put it where candidates are scored"
        )
    if min(counts) != max(counts):
        raise ValueError(f"canvases hold from {min(counts)} to {max(counts)} mask tokens: batch those of equally many")
    return is_mask.nonzero()[:, 1].view(len(canvas), -1)


def _read_candidates(candidates: TokenIds, masks: Tensor, vocab_size: int, mask_token_id: int) -> Tensor:
    """Return the candidates of every mask of masks [B, M], [B, M, K]."""
    tokens = _read_ids("candidates", candidates, masks.device, vocab_size)
    if bool((tokens == mask_token_id).any()):
        raise ValueError(f"candidates holds the mask token (id {mask_token_id}), which is never predicted: remove it")
    batch, num_masks = masks.shape
    number = tokens.shape[-1] if tokens.dim() else 0
    shape = (batch, num_masks, number)
    if tuple(tokens.shape) not in ((number,), (batch, number), shape):
        raise ValueError(
            f"candidates is {list(tokens.shape)}: give [number] for all masks, [{batch}, number] by sequence, or "
            f"[{batch}, {num_masks}, number] by mask"
        )
    return (tokens[:, None] if tokens.dim() == 2 else tokens).expand(shape)
