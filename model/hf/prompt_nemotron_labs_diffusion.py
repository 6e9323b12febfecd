"""Prompts of different lengths: padded on the left outside, on the right inside.

Inside, a row's tokens begin at slot 0 of the cache, so that slots are positions and padding lies where the first new
tokens will be written.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Checked prompts on the model's device.

    given: [B, P] as the caller has them. tokens: [B, P], padded on the right with the row's last token.
    lengths: of each row without padding, at least 1.
    """

    given: Tensor
    tokens: Tensor
    lengths: list[int]

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length."""
        return min(self.lengths) < self.tokens.shape[1]

    def last_tokens(self) -> Tensor:
        """[B, 1], the last token of each row."""
        return self.tokens[:, -1:]  # padding repeats it


def prepare_prompt(
    model: Any, prompt_ids: Tensor, attention_mask: Tensor | None, *, mask_token_id: int, max_new_tokens: int
) -> Prompt:
    """Check prompt_ids [B, P] and attention_mask [B, P], zero on left padding, or None.

    Raises:
        ValueError: no token ids of the vocabulary, a mask token among them, an empty prompt, padding elsewhere than on
            the left, or a context that prompt and new tokens overflow.
    """
    _check_ids(prompt_ids)
    mask = torch.ones_like(prompt_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    mask = mask.to(prompt_ids.device)
    _check_padding(prompt_ids, mask)
    lengths: list[int] = mask.sum(1).tolist()
    _check_tokens(prompt_ids, mask, model.config.vocab_size, mask_token_id)
    longest, limit = max(lengths), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    width = prompt_ids.shape[1]
    slots = torch.arange(longest, device=prompt_ids.device) + (width - mask.sum(1, keepdim=True))
    tokens = prompt_ids.gather(1, slots.clamp(max=width - 1))
    device = model.get_input_embeddings().weight.device
    return Prompt(prompt_ids.to(device), tokens.to(device), lengths)


def _check_ids(prompt_ids: Tensor) -> None:
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 2 or prompt_ids.is_floating_point():
        got = f"{prompt_ids.dtype} {list(prompt_ids.shape)}" if isinstance(prompt_ids, Tensor) else type(prompt_ids)
        raise ValueError(f"prompt_ids must be token ids [batch, length], got {got}")
    if prompt_ids.numel() == 0:
        raise ValueError(
            f"prompt_ids is empty {list(prompt_ids.shape)}: give at least one token, such as the bos token"
        )


def _check_padding(prompt_ids: Tensor, mask: Tensor) -> None:
    if mask.shape != prompt_ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, prompt_ids {list(prompt_ids.shape)}: they must agree")
    if not bool(mask.any(1).all()):
        row = int(mask.any(1).long().argmin())
        raise ValueError(f"row {row} of prompt_ids is empty, all of it padding: give at least one token")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        row = int((mask[:, :-1] & ~mask[:, 1:]).any(1).long().argmax())
        raise ValueError(
            f"row {row} of attention_mask has zeros behind a token: pad on the left (tokenizer.padding_side = 'left')"
        )


def _check_tokens(prompt_ids: Tensor, mask: Tensor, vocab_size: int, mask_token_id: int) -> None:
    tokens = prompt_ids[mask]
    low, high = (int(limit) for limit in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"prompt_ids holds id {low if low < 0 else high}, the vocabulary is 0..{vocab_size - 1}")
    masked = (prompt_ids == mask_token_id) & mask
    if bool(masked.any()):
        row, position = masked.nonzero()[0].tolist()
        raise ValueError(
            f"prompt_ids holds the mask token (id {mask_token_id}) in row {row} at index {position}: it stands for "
            "what is to be predicted and is no text; remove it"
        )
