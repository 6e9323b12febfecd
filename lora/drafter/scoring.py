"""The vocabulary's part of a training step: from hidden states to loss and acceptance, one chunk of blocks at a time.

Shapes: M blocks, D drafted positions per block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema.drafter import DraftLoss, DraftObjectiveConfig
from lora.drafter.objective import score_drafts
from lora.drafter.verified_objective import VerifiedDraft, draw_drafts

NUM_DRAFT_SUMS = 4  # loss, blocks, tokens accepted under greedy decoding, expected under rejection sampling


@dataclass(frozen=True)
class ScoredBlocks:
    """What the drafts of M blocks are scored with; none of it has gradients.

    verifier: [M, D, hidden], states of the text that predict each drafted position. targets: [M, D], the text there.
    scored: [M, D] bool. draws: [M, 1 + D], see DraftBatch. drafts, verified: [M, D] and [M, D, hidden], drafts that
    the verifier has read and its states; None if the text alone is read.
    """

    verifier: Tensor
    targets: Tensor
    scored: Tensor
    draws: Tensor
    drafts: Tensor | None = None
    verified: Tensor | None = None

    def cut(self, chunk: slice) -> "ScoredBlocks":
        """Return some of the blocks."""
        values = (self.verifier, self.targets, self.scored, self.draws, self.drafts, self.verified)
        return ScoredBlocks(*(None if value is None else value[chunk] for value in values))  # pyright: ignore[reportArgumentType]


class DraftScorer:
    """The vocabulary head and the objective."""

    def __init__(self, head: Any, objective: DraftObjectiveConfig, mask_token_id: int, chunk_blocks: int) -> None:
        """head: maps hidden states to logits. chunk_blocks: blocks whose logits are in memory at a time."""
        self.objective = objective
        self._head, self._mask_token_id, self._chunk_blocks = head, mask_token_id, chunk_blocks

    def score(self, drafted: Tensor, blocks: ScoredBlocks) -> tuple[Tensor, Tensor]:
        """Return (loss [], summed over blocks; sums [NUM_DRAFT_SUMS] fp64 without gradient).

        drafted: [M, D, hidden], with gradient.
        """
        return ScoreChunks.apply(drafted, blocks, self)  # type: ignore[return-value]

    def score_chunk(self, drafted: Tensor, blocks: ScoredBlocks) -> tuple[Tensor, Tensor]:
        """Do what score does, with the logits of all blocks at once."""
        with torch.no_grad():
            verifier_logits = self.project(blocks.verifier)
        logits = self.project(drafted)
        verified = self._verify(logits.detach(), verifier_logits, blocks)
        score = score_drafts(logits, verifier_logits, blocks.targets, blocks.scored, self.objective, verified)
        greedy, sampled = score.accepted_greedy.sum(), score.accepted_sampled.sum()
        counts = [score.loss.detach(), blocks.scored[:, 0].sum().to(sampled), greedy.to(sampled), sampled]
        return score.loss, torch.stack([count.double() for count in counts])

    @torch.no_grad()
    def _verify(self, logits: Tensor, verifier_logits: Tensor, blocks: ScoredBlocks) -> VerifiedDraft | None:
        if self.objective.loss is not DraftLoss.verified:
            return None
        if blocks.drafts is None:
            drafts = draw_drafts(logits, blocks.draws, self.objective.verified)
            return VerifiedDraft(drafts, blocks.targets, verifier_logits)
        assert blocks.verified is not None
        return VerifiedDraft(blocks.drafts, blocks.drafts, self.project(blocks.verified))

    @torch.no_grad()
    def draw(self, drafted: Tensor, draws: Tensor) -> Tensor:
        """Draw the drafts [M, D] of all blocks. drafted: [M, D, hidden]. draws: [M, 1 + D]."""
        config = self.objective.verified
        drafts = [draw_drafts(self.project(drafted[chunk]), draws[chunk], config) for chunk in self.chunks(len(draws))]
        return torch.cat(drafts)

    def chunks(self, num_blocks: int) -> Iterator[slice]:
        """Cut `num_blocks` blocks into chunks."""
        return (slice(start, start + self._chunk_blocks) for start in range(0, num_blocks, self._chunk_blocks))

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits as decoding sees them: the mask token is never chosen."""
        logits = self._head(hidden)
        never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        never[self._mask_token_id] = True
        # Finite: minus infinity times a probability of zero would not be a number.
        return logits.masked_fill(never, torch.finfo(logits.dtype).min / 2)


class ScoreChunks(torch.autograd.Function):
    """Loss over chunks of blocks; the gradient of the drafted states is formed in the forward.

    So only one chunk's logits are in memory, and the head is not computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, drafted: Tensor, blocks: ScoredBlocks, scorer: DraftScorer) -> tuple[Tensor, Tensor]:
        """Return (loss, sums) as DraftScorer.score. drafted: [M, D, hidden]."""
        gradient = torch.zeros_like(drafted)
        sums = torch.zeros(NUM_DRAFT_SUMS, dtype=torch.float64, device=drafted.device)
        for chunk in scorer.chunks(len(drafted)):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                hidden = drafted[chunk].detach().requires_grad_(ctx.needs_input_grad[0])
                loss, counts = scorer.score_chunk(hidden, blocks.cut(chunk))
                if ctx.needs_input_grad[0]:
                    (gradient[chunk],) = torch.autograd.grad(loss, hidden)
            sums += counts
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return sums[0].to(torch.float32), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradient that the forward formed."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None
