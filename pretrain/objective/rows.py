"""Which rows of a forward are scored, against which token and with which weight.

Shapes: B batch, S clean length, R rows: S (AR) or 2S (joint, [noisy | clean]), N scored rows.
With loss_mask in token space, the joint objective scores noisy row s where it is masked and may be scored (against
token s), and for every token s that may be scored the clean row of the token before it in the same document: row s - 1,
or further back where padding lies between. Tokens that only complete a block are the diffusion objective's alone:
autoregressive decoding stops before them.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from conf.schema import LossNormalization, StageConfig
from data_pipeline.batch import Batch
from data_pipeline.noise import NoisyBatch
from model.attention.layout import SequenceLayout, count_seen_rows
from model.megatron.head import ScoredRows


@dataclass(frozen=True)
class StepCounts:
    """What a number of sequences hold.

    clean: scored clean rows (N_clean). masked: scored noisy rows (N_masked). maskable: tokens that could be.
    text, context, block_padding, padding: tokens of a Batch, each of one kind: those that may be scored, may not
        (prompts), those that only complete a block, and those that are seen by none.
    rows, pairs: rows of the forward that are not padding, and pairs of them that see each other.
    """

    clean: int = 0
    masked: int = 0
    maskable: int = 0
    text: int = 0
    context: int = 0
    block_padding: int = 0
    padding: int = 0
    rows: int = 0
    pairs: int = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class RowSelection:
    """rows, targets [N] int64 as in ScoredRows; is_noisy [N] bool; inverse_p [N] fp32: 1/p (1 for clean rows)."""

    rows: Tensor
    targets: Tensor
    is_noisy: Tensor
    inverse_p: Tensor


@dataclass(frozen=True)
class ForwardInput:
    """One microbatch before its weights are known. tokens [B, R]; all on the CPU."""

    tokens: Tensor
    layout: SequenceLayout
    selection: RowSelection
    counts: StepCounts


def build_ar_input(batch: Batch) -> ForwardInput:
    """Clean tokens alone; the row of every token predicts the next one, where that may be scored."""
    return _build_input(batch, batch.tokens, _select_clean(batch, row_offset=0))


def build_joint_input(noisy: NoisyBatch) -> ForwardInput:
    """[noisy | clean]; masked noisy rows predict their own token, clean rows the next one."""
    batch = noisy.batch
    tokens = torch.cat([noisy.noisy_tokens, batch.tokens], dim=1)
    return _build_input(batch, tokens, _select_noisy(noisy), _select_clean(batch, row_offset=batch.tokens.shape[1]))


def _build_input(batch: Batch, tokens: Tensor, *selections: RowSelection) -> ForwardInput:
    doubled = len(selections) > 1
    layout = SequenceLayout(batch.document_ids, batch.block_ids, batch.position_ids, batch.block_padding, doubled)
    selection = _concatenate(*selections)
    return ForwardInput(tokens, layout, selection, _count(batch, layout, selection))


def _count(batch: Batch, layout: SequenceLayout, selection: RowSelection) -> StepCounts:
    padding, block_padding = int((batch.document_ids < 0).sum()), int(batch.block_padding.sum())
    text = int((batch.loss_mask & ~batch.block_padding).sum())
    num_masked = int(selection.is_noisy.sum())
    seen = count_seen_rows(layout)
    return StepCounts(
        clean=len(selection.rows) - num_masked,
        masked=num_masked,
        maskable=int(batch.loss_mask.sum()),
        text=text,
        context=batch.tokens.numel() - text - block_padding - padding,
        block_padding=block_padding,
        padding=padding,
        rows=int((seen > 0).sum()),
        pairs=int(seen.sum()),
    )


def compute_row_weights(selection: RowSelection, totals: StepCounts, stage: StageConfig) -> ScoredRows:
    """Weights [N] such that their sum with the cross entropies, over all microbatches and ranks, is the loss.

    `totals` are the counts of the whole global batch: this is where the loss denominator is chosen.
    """
    if stage.loss_normalization is LossNormalization.global_average:
        clean_denominator = noisy_denominator = totals.clean + totals.masked
    else:
        clean_denominator, noisy_denominator = totals.clean, totals.masked
    noisy_weight = stage.diffusion_weight * selection.inverse_p / max(noisy_denominator, 1)
    clean_weight = torch.full_like(selection.inverse_p, 1 / max(clean_denominator, 1))
    weights = torch.where(selection.is_noisy, noisy_weight, clean_weight)
    return ScoredRows(selection.rows, selection.targets, weights)


def _select_clean(batch: Batch, row_offset: int) -> RowSelection:
    before = _find_tokens_before(batch)
    scored = batch.loss_mask & ~batch.block_padding & (before >= 0)
    sequence, token = scored.nonzero(as_tuple=True)
    flat_rows = (before[sequence, token] + row_offset) * len(scored) + sequence
    is_noisy = torch.zeros(len(token), dtype=torch.bool)
    return RowSelection(flat_rows, batch.tokens[sequence, token], is_noisy, torch.ones(len(token)))


def _find_tokens_before(batch: Batch) -> Tensor:
    """[B, S] row of the token that comes before each token in its document; -1 where there is none."""
    is_text = (batch.document_ids >= 0) & ~batch.block_padding
    rows = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    latest = torch.where(is_text, rows, -1).cummax(dim=1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=1)
    same_document = batch.document_ids.gather(1, before.clamp(min=0)) == batch.document_ids
    return torch.where(is_text & same_document, before, -1)


def _select_noisy(noisy: NoisyBatch) -> RowSelection:
    sequence, row = (noisy.masked & noisy.batch.loss_mask).nonzero(as_tuple=True)
    flat_rows = row * len(noisy.masked) + sequence
    inverse_p = 1 / noisy.p_mask[sequence, row]
    is_noisy = torch.ones(len(row), dtype=torch.bool)
    return RowSelection(flat_rows, noisy.batch.tokens[sequence, row], is_noisy, inverse_p)


def _concatenate(*parts: RowSelection) -> RowSelection:
    return RowSelection(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.is_noisy for part in parts]),
        torch.cat([part.inverse_p for part in parts]),
    )
