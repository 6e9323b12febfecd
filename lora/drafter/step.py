"""One forward of the drafter's training: the clean tokens once, then all drafted blocks of a batch at once.

Shapes: B sequences, S tokens, K blocks per sequence, N tokens per block, D = N - 1 drafted positions.
The clean pass runs causally, without adapter and without gradients. It yields the prefix keys and values that the
blocks read, and the hidden states that the verifier's choices come from. Only the drafted blocks have gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema.drafter import DraftObjectiveConfig
from lora.drafter.batches import DraftBatch
from lora.drafter.blocks import (
    build_block_mask,
    build_block_position_ids,
    build_block_tokens,
    gather_targets,
    gather_verifier_states,
)
from lora.drafter.objective import score_drafts
from model.hf.attention_mask import Visibility, build_visibility
from model.hf.cache import PrefixCache
from model.hf.layers import DraftAdapter

NUM_DRAFT_SUMS = 4  # loss, blocks, tokens accepted under greedy decoding, expected under rejection sampling


class DraftStep(nn.Module):
    """The model with its adapter, as the module that DeepSpeed wraps."""

    def __init__(self, model: Any, objective: DraftObjectiveConfig, mask_token_id: int, chunk_blocks: int):
        """model: a PEFT model around NemotronLabsDiffusionModel. chunk_blocks: blocks scored at a time."""
        super().__init__()
        self.model = model
        self._objective = objective
        self._mask_token_id = mask_token_id
        self._chunk_blocks = chunk_blocks
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
            clean = self._encode(batch.tokens, cache=cache, commit=True)
        drafted = self._encode(
            build_block_tokens(batch, self._mask_token_id),
            position_ids=build_block_position_ids(batch),
            mask=build_block_mask(batch),
            cache=cache,
            commit=False,
        )
        # All blocks, even those that only fill up: under ZeRO-3 every rank must call the head equally often.
        return ScoreChunks.apply(
            drafted.view(*batch.anchors.shape, -1, drafted.shape[-1])[:, :, 1:].flatten(0, 1),
            gather_verifier_states(clean, batch).flatten(0, 1),
            gather_targets(batch).flatten(0, 1),
            batch.scored.flatten(0, 1),
            self,
        )  # type: ignore[return-value]

    def _encode(
        self,
        tokens: Tensor,
        *,
        cache: PrefixCache,
        commit: bool,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [B, N, hidden] of tokens [B, N]; by default causal and from position 0 on."""
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
        hidden = encoder.embed_tokens(tokens)
        if visibility.mask is not None:
            visibility = Visibility(mask=_build_bias(visibility.mask, hidden.dtype))
        cache.begin(num_new, tokens.device)
        encoded = encoder(hidden, self.base.rotary(position_ids, hidden.dtype), visibility, cache)
        if commit:
            cache.advance(num_new)
        return encoded

    def score(self, drafted: Tensor, verifier: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, sums) as forward does, for one chunk of hidden states [M, D, hidden]."""
        with torch.no_grad():
            verifier_logits = self._project(verifier)
        score = score_drafts(self._project(drafted), verifier_logits, targets, scored, self._objective)
        greedy, sampled = score.accepted_greedy.sum(), score.accepted_sampled.sum()
        counts = torch.stack([score.loss.detach(), scored[:, 0].sum().to(sampled), greedy.to(sampled), sampled])
        return score.loss, counts.double()

    def chunks(self, num_blocks: int) -> list[slice]:
        """Cut `num_blocks` blocks into chunks."""
        return [slice(start, start + self._chunk_blocks) for start in range(0, num_blocks, self._chunk_blocks)]

    def _project(self, hidden: Tensor) -> Tensor:
        """Return logits as decoding sees them: the mask token is never chosen."""
        logits = self.base.diffusion_head(hidden)
        never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        never[self._mask_token_id] = True
        # Finite: minus infinity times a probability of zero would not be a number.
        return logits.masked_fill(never, torch.finfo(logits.dtype).min / 2)


class ScoreChunks(torch.autograd.Function):
    """Loss over chunks of blocks; the gradient of the drafted states is formed in the forward.

    So only one chunk's logits are in memory, and the head is not computed a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, drafted: Tensor, verifier: Tensor, targets: Tensor, scored: Tensor, step: DraftStep
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, sums) as DraftStep.forward. drafted, verifier: [M, D, hidden]; targets, scored: [M, D]."""
        gradient = torch.zeros_like(drafted)
        sums = torch.zeros(NUM_DRAFT_SUMS, dtype=torch.float64, device=drafted.device)
        for chunk in step.chunks(len(drafted)):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                hidden = drafted[chunk].detach().requires_grad_(ctx.needs_input_grad[0])
                loss, counts = step.score(hidden, verifier[chunk], targets[chunk], scored[chunk])
                if ctx.needs_input_grad[0]:
                    (gradient[chunk],) = torch.autograd.grad(loss, hidden)
            sums += counts
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(torch.float32), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradient that the forward formed."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def _build_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as a bias of attention scores, once for all layers.

    From a bool mask attention would build the bias again in every layer, and save each of them for the backward.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
