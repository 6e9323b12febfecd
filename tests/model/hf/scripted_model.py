"""A model whose logits follow from who sees whom, exactly: a wrong mask, position or cached token changes them.

The logits at a position are a fixed function of the tokens seen there and of their positions, so two positions agree
only if they see the same context. Masks know what greedy AR will say, and say it as often as asked, so that drafts can
have any quality.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

NUM_CONTEXTS = 4099  # different logits there are


class Script:
    """Replaces the encoder's computation. Token ids travel as one-hot hidden states."""

    def __init__(self, model: Any, accuracy: float, seed: int, never: Sequence[int]):
        generator = torch.Generator().manual_seed(seed)
        config, self._model, self._accuracy = model.config, model, accuracy
        positions = torch.arange(config.max_position_embeddings)[None]
        encoding = model.rotary(positions, torch.float64)
        self._angles = (encoding.cos[0, 0], encoding.sin[0, 0])
        self._factors = torch.randint(1, NUM_CONTEXTS, positions.shape[1:], generator=generator)
        self._logits = torch.randn(NUM_CONTEXTS, config.vocab_size, generator=generator, dtype=torch.float64)
        self._logits[:, list(never)] = -100.0
        self._luck = torch.rand(NUM_CONTEXTS, generator=generator)
        allowed = self._logits.clone()
        allowed[:, config.mask_token_id] = -torch.inf
        self._greedy = allowed.argmax(-1)

    def __call__(self, hidden: Tensor, positions: Any, visibility: Any, cache: Any, *_: Any, **__: Any) -> Tensor:
        """Compute what the encoder's forward would; a hidden state is its logits."""
        tokens, places = hidden.argmax(-1), self._find_positions(positions)
        states = torch.stack((tokens, places.expand_as(tokens)), dim=-1)[:, None].double()
        if cache is not None:
            states, _ = cache.update(states, states, 0)
        seen, is_mask = self._find_visible(hidden, states, visibility), tokens == self._model.config.mask_token_id
        known, where = states[:, 0, :, 0].long(), states[:, 0, :, 1].long()
        contributions = self._contribute(known, where)[:, None].expand_as(seen)
        is_clean = (known != self._model.config.mask_token_id)[:, None].expand_as(seen)
        # A verified position must see no mask: there its contribution counts and spoils the logits.
        context = (contributions * (seen & (is_clean | ~is_mask[..., None]))).sum(-1) % NUM_CONTEXTS
        last = (where[:, None] * (seen & is_clean)).amax(-1)
        return torch.where(is_mask[..., None], self._draft(context, last, places), self._logits[context])

    def _contribute(self, tokens: Tensor, places: Tensor) -> Tensor:
        return (tokens + 1) * self._factors[places] % NUM_CONTEXTS

    def _find_positions(self, encoding: Any) -> Tensor:
        """Find the positions [B or 1, N] whose angles these are."""
        # The sum of cos(angle - angle') over the dimensions is largest where all angles are equal.
        closeness: Any = 0
        for given, table in zip((encoding.cos, encoding.sin), self._angles, strict=True):
            closeness = closeness + given[:, 0] @ table.T
        assert (closeness.amax(-1) - self._angles[0].shape[1]).abs().max() < 1e-6
        return closeness.argmax(-1)

    def _find_visible(self, hidden: Tensor, states: Tensor, visibility: Any) -> Tensor:
        """Find the slots [B, N, T] bool that attention without any preference gives weight to."""
        batch, num_slots = len(hidden), states.shape[2]
        flat = [hidden.new_zeros(batch, 1, length, num_slots) for length in (hidden.shape[1], num_slots)]
        slots = torch.eye(num_slots, dtype=hidden.dtype).expand(batch, 1, -1, -1)  # a head as wide as there are slots
        return self._model.encoder.layers[0].self_attn._attend(*flat, slots, visibility)[:, :, 0] > 0

    def _draft(self, context: Tensor, last: Tensor, places: Tensor) -> Tensor:
        """Compute the logits of masks: AR's token there or, by chance that repeats itself, the next id."""
        distance, token = places - last, self._greedy[context]
        ahead = context
        for step in range(1, int(distance.max())):
            moved = (ahead + self._contribute(token, (last + step).clamp(max=len(self._factors) - 1))) % NUM_CONTEXTS
            ahead = torch.where(distance > step, moved, ahead)
            token = self._greedy[ahead]
        luck = self._luck[(context + 31 * places) % NUM_CONTEXTS]
        vocab_size = self._logits.shape[1]
        token = torch.where(luck < self._accuracy, token, (token + 1) % vocab_size)
        certainty = 2 + 4 * self._luck[(7 * context + places) % NUM_CONTEXTS].double()
        logits = 0.3 * self._logits[(context + places) % NUM_CONTEXTS]
        return logits.scatter_add(-1, token[..., None], certainty[..., None])


def make_scripted_model(
    make_model: Callable[..., Any], accuracy: float, seed: int = 0, *, never: Sequence[int] = (), **overrides: Any
) -> Any:
    """Make a model whose masks say what AR would with probability `accuracy`.

    never: ids that AR does not say. overrides: of the config.
    """
    size = overrides.pop("vocab_size", 24)
    overrides = {"mask_token_id": size - 1, "num_hidden_layers": 1, "hidden_size": size} | overrides
    model: NemotronLabsDiffusionModel = make_model(
        vocab_size=size, num_attention_heads=1, num_key_value_heads=1, **overrides
    )
    with torch.no_grad():
        model.encoder.embed_tokens.weight.copy_(torch.eye(size))
        model.diffusion_head.weight.copy_(torch.eye(size))
    model.encoder.forward = Script(model, accuracy, seed, never)  # pyright: ignore[reportAttributeAccessIssue]
    return model
