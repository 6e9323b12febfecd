"""One forward of the drafter's training: the clean tokens once, then all drafted blocks of a batch at once.

Shapes: B sequences, S tokens, K blocks per sequence, N tokens per block, D = N - 1 drafted positions.
The clean pass runs causally, without adapter and without gradients. It yields both the prefix keys and values that the
blocks read and the hidden rows the verifier's choices come from. Gradients flow through the drafted blocks alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema.drafter import DraftObjectiveConfig
from lora.blocks import DraftBatch, build_block_mask, build_block_positions, build_block_tokens, gather_targets
from lora.objective import score_drafts
from model.hf.attention_mask import Visibility, build_visibility
from model.hf.cache import PrefixCache
from model.hf.layers import DraftAdapter

NUM_SUMS = 4  # loss, blocks, tokens accepted under greedy decoding, expected under rejection sampling


class DraftStep(nn.Module):
    """The model with its adapter, as DeepSpeed sees it."""

    def __init__(self, model: Any, objective: DraftObjectiveConfig, mask_token_id: int, chunk_blocks: int):
        """model: a PEFT model around NemotronLabsDiffusionModel. chunk_blocks: blocks scored at a time."""
        super().__init__()
        self.model = model
        self._objective = objective
        self._mask_token_id = mask_token_id
        self._chunk_blocks = chunk_blocks
        self._adapter = DraftAdapter(model)
        self.train()  # layers are recomputed in training mode alone; there is no dropout that it would switch on

    @property
    def base(self) -> Any:
        """The tri-mode model itself."""
        return self.model.get_base_model()

    def forward(self, batch: DraftBatch) -> tuple[Tensor, Tensor]:
        """(loss [], summed over the blocks of the batch; sums [NUM_SUMS] fp64 without gradient)."""
        num_new = batch.anchors.shape[1] * (batch.scored.shape[2] + 1)
        cache = PrefixCache(self.base.config.num_hidden_layers, capacity=batch.tokens.shape[1] + num_new)
        with torch.no_grad(), self._adapter.suspended():
            clean = self._encode(batch.tokens, cache=cache, commit=True)
        drafted = self._encode(
            build_block_tokens(batch, self._mask_token_id),
            positions=build_block_positions(batch),
            mask=build_block_mask(batch),
            cache=cache,
            commit=False,
        )
        # All blocks, also those that only fill up: under ZeRO-3 every rank must call the head equally often.
        return ScoreChunks.apply(
            drafted.view(*batch.anchors.shape, -1, drafted.shape[-1])[:, :, 1:].flatten(0, 1),
            gather_verifier_rows(clean, batch).flatten(0, 1),
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
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden rows [B, N, hidden] of tokens [B, N]; causal and from position 0 unless told otherwise."""
        config, num_new = self.base.config, tokens.shape[1]
        visibility = build_visibility(
            mask,
            num_new=num_new,
            num_total=cache.length + num_new,
            bidirectional=False,
            group_size=config.num_attention_heads // config.num_key_value_heads,
            device=tokens.device,
        )
        if positions is None:
            positions = torch.arange(num_new, device=tokens.device)[None]
        encoder = self.base.encoder
        hidden = encoder.embed_tokens(tokens)
        if visibility.mask is not None:
            visibility = Visibility(mask=build_bias(visibility.mask, hidden.dtype))
        cache.begin(num_new, tokens.device)
        encoded = encoder(hidden, encoder.rotary(positions, hidden.dtype), visibility, cache)
        if commit:
            cache.advance(num_new)
        return encoded

    def score(self, drafted: Tensor, verifier: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, sums) as forward gives them, for one chunk of hidden rows [M, D, hidden]."""
        with torch.no_grad():
            verifier_logits = self._project(verifier)
        score = score_drafts(self._project(drafted), verifier_logits, targets, scored, self._objective)
        greedy, sampled = score.accepted_greedy.sum(), score.accepted_sampled.sum()
        counts = torch.stack([score.loss.detach(), scored[:, 0].sum().to(sampled), greedy.to(sampled), sampled])
        return score.loss, counts.double()

    def chunks(self, num_blocks: int) -> list[slice]:
        """Pieces of `num_blocks` blocks."""
        return [slice(start, start + self._chunk_blocks) for start in range(0, num_blocks, self._chunk_blocks)]

    def _project(self, hidden: Tensor) -> Tensor:
        """Logits as decoding sees them: the mask token is never chosen."""
        logits = self.base.diffusion_head(hidden)
        never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        never[self._mask_token_id] = True
        # Finite: minus infinity times a probability of zero would not be a number.
        return logits.masked_fill(never, torch.finfo(logits.dtype).min / 2)


class ScoreChunks(torch.autograd.Function):
    """Loss over chunks of blocks, with the gradient of the drafted rows formed in the forward.

    So the logits of one chunk are all that is in memory, and the head is not computed a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, drafted: Tensor, verifier: Tensor, targets: Tensor, scored: Tensor, step: DraftStep
    ) -> tuple[Tensor, Tensor]:
        """drafted, verifier: [M, D, hidden]; targets, scored: [M, D]; returns as DraftStep.forward."""
        gradient = torch.zeros_like(drafted)
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=drafted.device)
        for chunk in step.chunks(len(drafted)):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                rows = drafted[chunk].detach().requires_grad_(ctx.needs_input_grad[0])
                loss, counts = step.score(rows, verifier[chunk], targets[chunk], scored[chunk])
                if ctx.needs_input_grad[0]:
                    (gradient[chunk],) = torch.autograd.grad(loss, rows)
            sums += counts
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(torch.float32), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scales what the forward formed."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def build_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask as what is added to scores. Attention would make it of a bool mask in every layer, and keep each of them."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def gather_verifier_rows(clean: Tensor, batch: DraftBatch) -> Tensor:
    """[B, K, D, hidden]: rows of clean [B, S, hidden] that predict each drafted position, from the seed's on."""
    positions = build_block_positions(batch).view(*batch.anchors.shape, -1)[:, :, :-1]
    inside = positions.clamp(max=clean.shape[1] - 1)
    rows = torch.arange(len(clean), device=clean.device)[:, None, None]
    return clean[rows, inside]
