"""What all decoding modes share: checks, one counted forward, stop tokens, the result."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter_nemotron_labs_diffusion import DraftAdapter
from .cache_nemotron_labs_diffusion import PrefixCache

FIRST_CAPACITY = 1024  # tokens of room behind the prompt to begin with; the cache doubles when it is full


@dataclass(frozen=True)
class DecodeResult:
    """One finished decode.

    output_ids: [B, P + T], prompt included; a row that stopped early is filled up with its first stop token id.
    num_new_tokens: [B], new tokens of each row up to and including its stop token.
    num_forwards: model calls, prefill, drafts, verifications and cache commits included.
    acceptance_lengths: tokens emitted by each draft-verify cycle, bonus included; empty without speculation.
    """

    output_ids: Tensor
    num_new_tokens: list[int]
    num_forwards: int
    acceptance_lengths: list[int]

    @property
    def num_cycles(self) -> int:
        """Draft-verify cycles."""
        return len(self.acceptance_lengths)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a row (mean over the batch) per model call; 1 for AR."""
        return sum(self.num_new_tokens) / len(self.num_new_tokens) / self.num_forwards

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per draft-verify cycle; None without one."""
        return sum(self.acceptance_lengths) / self.num_cycles if self.acceptance_lengths else None


class DecodeSession:
    """One decode in progress: model, KV cache, the id that is never chosen, and the count of forwards."""

    def __init__(self, model: Any, mask_token_id: int, capacity: int):
        """capacity: tokens the cache has room for at first."""
        self.model = model
        self.mask_token_id = mask_token_id
        self.cache = PrefixCache(model.config.num_hidden_layers, capacity)
        self.adapter = DraftAdapter(model)
        self.num_forwards = 0

    def forward(
        self, tokens: Tensor, *, rows: int | slice | Tensor, bidirectional: bool = False, commit: bool = True
    ) -> Tensor:
        """Logits of `rows` of tokens [B, N] behind the cached prefix, the mask token's at minus infinity.

        rows, bidirectional, commit: as logits_to_keep, bidirectional, commit in the model's forward.
        """
        self.num_forwards += 1
        output = self.model(
            tokens, past_key_values=self.cache, logits_to_keep=rows, bidirectional=bidirectional, commit=commit
        )
        output.logits[..., self.mask_token_id] = -torch.inf
        return output.logits


def prepare_prompt(model: Any, prompt_ids: Tensor) -> Tensor:
    """The prompt on the model's device.

    Raises:
        ValueError: prompt_ids is not a non-empty [batch, length] tensor of ids within the vocabulary.
    """
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 2 or prompt_ids.is_floating_point():
        got = f"{prompt_ids.dtype} {list(prompt_ids.shape)}" if isinstance(prompt_ids, Tensor) else type(prompt_ids)
        raise ValueError(f"prompt_ids must be token ids [batch, length], got {got}")
    if prompt_ids.numel() == 0:
        raise ValueError(
            f"prompt_ids is empty {list(prompt_ids.shape)}: give at least one token, such as the bos token"
        )
    low, high = (int(limit) for limit in prompt_ids.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"prompt_ids holds id {low if low < 0 else high}, the vocabulary is 0..{model.config.vocab_size - 1}"
        )
    return prompt_ids.to(model.get_input_embeddings().weight.device)


def check_decode_arguments(
    *, max_new_tokens: int, temperature: float, block_length: int = 1, threshold: float = 0.0
) -> None:
    """ValueError for values that no mode can serve."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}; it must be at least 1 (one token per block)")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or positive")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it is a probability between 0 and 1")


def resolve_mask_token_id(config: Any, mask_token_id: int | None = None) -> int:
    """The given id, else the config's. Raises ValueError outside the vocabulary."""
    resolved = config.mask_token_id if mask_token_id is None else mask_token_id
    if not 0 <= resolved < config.vocab_size:
        raise ValueError(f"mask_token_id {resolved} is outside the vocabulary 0..{config.vocab_size - 1}")
    return resolved


def resolve_stop_ids(config: Any, eos_token_id: int | Iterable[int] | None) -> tuple[int, ...]:
    """Ids that end a row: the given one or ones, else the config's; an empty list means never."""
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def is_stop(tokens: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """Bool, where tokens (any shape) hold a stop id."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for stop_id in stop_ids:
        found |= tokens == stop_id
    return found


def finish(
    session: DecodeSession,
    prompt_ids: Tensor,
    new_tokens: Tensor,
    stop_ids: tuple[int, ...],
    acceptance_lengths: list[int],
) -> DecodeResult:
    """Cut new_tokens [B, T] behind each row's first stop token and put the result together."""
    stops = is_stop(new_tokens, stop_ids).long()
    behind = stops.cumsum(1) - stops > 0
    num_new_tokens: list[int] = (~behind).sum(1).tolist()
    if stop_ids:
        new_tokens = new_tokens.masked_fill(behind, stop_ids[0])[:, : max(num_new_tokens)]
    output_ids = torch.cat((prompt_ids, new_tokens.to(prompt_ids.dtype)), dim=1)
    return DecodeResult(output_ids, num_new_tokens, session.num_forwards, acceptance_lengths)
