"""Select the positions of a forward that are scored, each with its target, and count what a batch holds.

With loss_mask in token space, the joint objective scores noisy position s where it is masked and may be scored (against
token s), and for every token s that may be scored the clean position of the token before it in the same document:
position s - 1, or further back where padding lies between. Block padding is scored by the diffusion objective alone:
autoregressive decoding stops before it.
Scores and counts are those of whole forwards, [noisy | clean]; take_local finds what a rank computes among them.
Shapes: B batch, S clean length, R positions: S (AR) or 2S (joint), in take_local those of a rank; N scored positions.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.noise import NoisyBatch
from model.attention.positions import ForwardPositions
from model.attention.visibility import count_visible_keys
from model.megatron.head import ScoredPositions


@dataclass(frozen=True)
class StepCounts:
    """Counts what a number of sequences hold.

    clean: scored clean positions (N_clean). masked: scored noisy positions (N_masked).
    maskable: tokens that noise could have masked.
    text, prompt, block_padding, padding: tokens of a Batch, each of one kind: those that may be scored, those that may
        not, those that only fill a block, and those that are seen by none.
    positions, attended_pairs: the useful positions of the forward, and the pairs of them that see each other: clean
        text, and noisy tokens of live blocks.
    computed_positions: of the forwards on all ranks, with padding and what only fills up a length.
    images, patches, attended_patches: pictures, their patches, and pairs of patches of the same picture.
    """

    clean: int = 0
    masked: int = 0
    maskable: int = 0
    text: int = 0
    prompt: int = 0
    block_padding: int = 0
    padding: int = 0
    positions: int = 0
    attended_pairs: int = 0
    computed_positions: int = 0
    images: int = 0
    patches: int = 0
    attended_patches: int = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def score_ar(batch: Batch) -> ScoredPositions:
    """Score clean tokens alone: every position predicts the next token of its document, where that may be scored."""
    return _score_clean(batch, first_position=0)


def score_joint(noisy: NoisyBatch) -> ScoredPositions:
    """Score [noisy | clean]: masked noisy positions predict their own token, clean positions the next one."""
    clean = _score_clean(noisy.batch, first_position=noisy.batch.tokens.shape[1])
    return ScoredPositions(
        *(torch.cat(pair) for pair in zip(_score_noisy(noisy).fields(), clean.fields(), strict=True))
    )


def _score_clean(batch: Batch, first_position: int) -> ScoredPositions:
    before = _find_tokens_before(batch)
    sequence, token = (batch.loss_mask & ~batch.block_padding & (before >= 0)).nonzero(as_tuple=True)
    positions = (before[sequence, token] + first_position) * len(batch.tokens) + sequence
    everywhere = torch.ones(len(token), dtype=torch.bool)
    return _unweighted(positions, batch.tokens[sequence, token], torch.ones(len(token)), ~everywhere, everywhere)


def _find_tokens_before(batch: Batch) -> Tensor:
    """Return [B, S] the index of the token before each token in its document; -1 where there is none."""
    is_text = batch.layout.is_text
    index = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    latest = torch.where(is_text, index, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    same_document = batch.document_ids.gather(1, before.clamp(min=0)) == batch.document_ids
    return torch.where(is_text & same_document, before, -1)


def _score_noisy(noisy: NoisyBatch) -> ScoredPositions:
    sequence, token = (noisy.masked & noisy.batch.loss_mask).nonzero(as_tuple=True)
    positions, targets = token * len(noisy.masked) + sequence, noisy.batch.tokens[sequence, token]
    inverse_p, is_text = 1 / noisy.p_mask[sequence, token], noisy.batch.layout.is_text[sequence, token]
    return _unweighted(positions, targets, inverse_p, torch.ones_like(is_text), is_text)


def _unweighted(
    positions: Tensor, targets: Tensor, inverse_p: Tensor, is_noisy: Tensor, is_text: Tensor
) -> ScoredPositions:
    return ScoredPositions(positions, targets, torch.zeros_like(inverse_p), inverse_p, is_noisy, is_text)


def count_step(batch: Batch, scored: ScoredPositions, is_live: Tensor | None, computed_positions: int) -> StepCounts:
    """Count what the forward of one batch holds. is_live: [B, S] of noisy positions; None: there are none (AR)."""
    num_masked, visible_keys = int(scored.is_noisy.sum()), count_visible_keys(batch.layout, is_live is not None)
    if is_live is not None:
        visible_keys[:, : batch.layout.sequence_length] *= is_live
    padding, block_padding = int((batch.document_ids < 0).sum()), int(batch.block_padding.sum())
    text = int((batch.loss_mask & ~batch.block_padding).sum())
    return StepCounts(
        clean=len(scored.positions) - num_masked,
        masked=num_masked,
        maskable=int(batch.loss_mask.sum()),
        text=text,
        prompt=batch.tokens.numel() - text - block_padding - padding,
        block_padding=block_padding,
        padding=padding,
        positions=int((visible_keys > 0).sum()),
        attended_pairs=int(visible_keys.sum()),
        computed_positions=computed_positions,
    )


def take_local(tokens: Tensor, scored: ScoredPositions, positions: ForwardPositions) -> tuple[Tensor, ScoredPositions]:
    """Return the tokens [B, R] of a rank's positions, given those of a whole forward, and what of them is scored."""
    batch_size, num_whole = tokens.shape
    places = positions.find_in_whole().expand(batch_size, -1)
    local = torch.full((batch_size, num_whole + 1), -1)  # the last place is for padding
    local.scatter_(1, torch.where(places < 0, num_whole, places), torch.arange(places.shape[1]).expand_as(places))
    place, sequence = scored.positions // batch_size, scored.positions % batch_size
    position = local[sequence, place]
    fields = (position * batch_size + sequence, *scored.fields()[1:])
    return positions.take(tokens), ScoredPositions(*(field[position >= 0] for field in fields))
