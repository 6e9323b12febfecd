"""One forward of the drafter's training: the clean tokens once, then all drafted blocks of a batch at once.

Shapes: B sequences, S tokens, K blocks per sequence, N tokens per block, D = N - 1 drafted positions.
The clean pass runs causally, without adapter and without gradients. It yields the prefix keys and values that the
blocks read, and the hidden states that the verifier's choices come from. Only the drafted blocks have gradients.
A third pass verifies drafts, causally and without adapter, where the loss asks for it and the text cannot answer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema.drafter import DrafterConfig, DraftLoss, DraftObjectiveConfig, ResponseSource, VerifiedPositions
from lora.drafter.adapter import attach_new_adapter
from lora.drafter.batches import DraftBatch
from lora.drafter.blocks import (
    build_block_mask,
    build_block_position_ids,
    build_block_tokens,
    gather_targets,
    gather_verifier_states,
)
from lora.drafter.scoring import DraftScorer, ScoredBlocks
from model.export.images import load_pixels
from model.hf.attention_mask import Visibility, build_visibility
from model.hf.cache import PrefixCache
from model.hf.layers import DraftAdapter


class DraftStep(nn.Module):
    """The model with its adapter, as the module that DeepSpeed wraps."""

    def __init__(
        self,
        model: Any,
        objective: DraftObjectiveConfig,
        mask_token_id: int,
        chunk_blocks: int,
        *,
        is_greedy_text: bool = False,
    ):
        """Wrap `model`, a PEFT model around NemotronLabsDiffusionModel.

        chunk_blocks: blocks scored at a time. is_greedy_text: the text is the model's own greedy response.
        """
        super().__init__()
        self.model = model
        self.scorer = DraftScorer(self.base.diffusion_head, objective, mask_token_id, chunk_blocks)
        self.verifies = needs_verification(objective, is_greedy_text=is_greedy_text)
        self._mask_token_id = mask_token_id
        self._adapter = DraftAdapter(model)
        self.train()  # layers are recomputed in training mode only; there is no dropout that it would switch on

    @property
    def base(self) -> Any:
        """The tri-mode model itself."""
        return self.model.get_base_model()

    def forward(self, batch: DraftBatch) -> tuple[Tensor, Tensor]:
        """Return (loss [], summed over the blocks of the batch; sums [NUM_DRAFT_SUMS] fp64 without gradient)."""
        num_new = batch.anchors.shape[1] * (batch.scored.shape[2] + 1)
        cache = PrefixCache(self.base.config.num_hidden_layers, capacity=batch.tokens.shape[1] + num_new)
        with torch.no_grad(), self._adapter.suspended():
            pixels = load_pixels(batch.images)
            embedded = self.base.embed_prompt(batch.tokens, **pixels) if pixels else None
            clean = self._encode(batch.tokens, cache=cache, commit=True, embedded=embedded)
        drafted = self._encode_blocks(batch, self._mask_token_id, cache)[:, :, 1:].flatten(0, 1)
        drafts = verified = None
        if self.verifies:
            drafts = self.scorer.draw(drafted, batch.draws.flatten(0, 1))
            verified = self._verify(batch, drafts, cache).flatten(0, 1)
        # All blocks, even those that only fill up: under ZeRO-3 every rank must call the head equally often.
        blocks = ScoredBlocks(
            verifier=gather_verifier_states(clean, batch).flatten(0, 1),
            targets=gather_targets(batch).flatten(0, 1),
            scored=batch.scored.flatten(0, 1),
            draws=batch.draws.flatten(0, 1),
            drafts=drafts,
            verified=verified,
        )
        return self.scorer.score(drafted, blocks)

    @torch.no_grad()
    def _verify(self, batch: DraftBatch, drafts: Tensor, cache: PrefixCache) -> Tensor:
        """Return the verifier's states [B, K, D, hidden] that judge drafts [B * K, D] after their seeds."""
        with self._adapter.suspended():
            return self._encode_blocks(batch, drafts.view(batch.scored.shape), cache, causal=True)[:, :, :-1]

    def _encode_blocks(
        self, batch: DraftBatch, following: Tensor | int, cache: PrefixCache, *, causal: bool = False
    ) -> Tensor:
        """Return the states [B, K, N, hidden] of all blocks, after what is cached; the arguments are blocks.py's."""
        encoded = self._encode(
            build_block_tokens(batch, following),
            position_ids=build_block_position_ids(batch),
            mask=build_block_mask(batch, causal=causal),
            cache=cache,
            commit=False,
        )
        return encoded.unflatten(1, (batch.anchors.shape[1], -1))

    def _encode(
        self,
        tokens: Tensor,
        *,
        cache: PrefixCache,
        commit: bool,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [B, N, hidden] of tokens [B, N]; by default causal and from position 0 on.

        embedded: [B, N, hidden] in place of the tokens' own embeddings, where there are images.
        """
        config, num_new = self.base.config, tokens.shape[1]
        visibility = build_visibility(
            mask,
            num_new=num_new,
            num_total=cache.length + num_new,
            bidirectional=False,
            group_size=config.num_attention_heads // config.num_key_value_heads,
            device=tokens.device,
        )
        if position_ids is None:
            position_ids = torch.arange(num_new, device=tokens.device)[None]
        encoder = self.base.encoder
        hidden = encoder.embed_tokens(tokens) if embedded is None else embedded
        if visibility.mask is not None:
            visibility = Visibility(mask=_build_bias(visibility.mask, hidden.dtype))
        cache.begin(num_new, tokens.device)
        encoded = encoder(hidden, self.base.rotary(position_ids, hidden.dtype), visibility, cache)
        if commit:
            cache.advance(num_new)
        return encoded


def build_step(model: Any, config: DrafterConfig) -> DraftStep:
    """Attach a new adapter to `model`, a NemotronLabsDiffusionModel, and wrap both for training."""
    adapted = attach_new_adapter(model, config.adapter, config.train.seed)
    if config.runtime.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return DraftStep(
        adapted,
        config.objective,
        model.config.mask_token_id,
        config.runtime.loss_chunk_blocks,
        is_greedy_text=config.responses.source is ResponseSource.greedy,
    )


def needs_verification(objective: DraftObjectiveConfig, *, is_greedy_text: bool) -> bool:
    """Return whether drafts must be read by the verifier, or the text says all that the loss asks for.

    Active positions follow the verifier's own greedy choices. If the text is made of these, its clean pass has read
    the same tokens.
    """
    if objective.loss is not DraftLoss.verified:
        return False
    return not is_greedy_text or objective.verified.positions is VerifiedPositions.all


def _build_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as a bias of attention scores, once for all layers.

    From a bool mask attention would build the bias again in every layer, and save each of them for the backward.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
