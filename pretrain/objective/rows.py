"""Which rows of a forward are scored, against which token and with which weight.

Shapes: B batch, S clean length, R rows: S (AR) or 2S (joint, [noisy | clean]), N scored rows.
With loss_mask in token space, the joint objective scores noisy row s where it is masked (against token s) and clean
row s - 1 where token s may be scored and belongs to the same document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import LossNormalization, StageConfig
from data_pipeline.batch import Batch
from model.attention.layout import SequenceLayout
from model.head import ScoredRows
from pretrain.objective.noise import NoisyBatch


@dataclass(frozen=True)
class LossCounts:
    """clean: scored clean rows (N_clean). masked: scored noisy rows (N_masked). maskable: tokens that could be."""

    clean: int
    masked: int
    maskable: int

    def __add__(self, other: "LossCounts") -> "LossCounts":
        return LossCounts(self.clean + other.clean, self.masked + other.masked, self.maskable + other.maskable)


@dataclass(frozen=True)
class RowSelection:
    """rows, targets [N] int64 as in ScoredRows; is_noisy [N] bool; inverse_p [N] fp32: 1/p (1 for clean rows)."""

    rows: Tensor
    targets: Tensor
    is_noisy: Tensor
    inverse_p: Tensor
    counts: LossCounts


@dataclass(frozen=True)
class ForwardInput:
    """One microbatch before its weights are known. tokens [B, R]; all on the CPU."""

    tokens: Tensor
    layout: SequenceLayout
    selection: RowSelection


def build_ar_input(batch: Batch) -> ForwardInput:
    """Clean tokens alone; every clean row with a scored successor predicts it."""
    return ForwardInput(batch.tokens, _layout(batch, doubled=False), _concatenate(_select_clean(batch, row_offset=0)))


def build_joint_input(noisy: NoisyBatch) -> ForwardInput:
    """[noisy | clean]; masked noisy rows predict their own token, clean rows the next one."""
    batch = noisy.batch
    tokens = torch.cat([noisy.noisy_tokens, batch.tokens], dim=1)
    selection = _concatenate(_select_noisy(noisy), _select_clean(batch, row_offset=batch.tokens.shape[1]))
    return ForwardInput(tokens, _layout(batch, doubled=True), selection)


def compute_row_weights(selection: RowSelection, totals: LossCounts, stage: StageConfig) -> ScoredRows:
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


def _layout(batch: Batch, doubled: bool) -> SequenceLayout:
    return SequenceLayout(batch.document_ids, batch.block_ids, batch.positions, doubled)


def _select_clean(batch: Batch, row_offset: int) -> RowSelection:
    same_document = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    scored = batch.loss_mask[:, 1:] & same_document & (batch.document_ids[:, 1:] >= 0)
    sequence, row = scored.nonzero(as_tuple=True)
    flat_rows = (row + row_offset) * len(scored) + sequence
    counts = LossCounts(clean=len(row), masked=0, maskable=int(batch.loss_mask.sum()))
    is_noisy = torch.zeros(len(row), dtype=torch.bool)
    return RowSelection(flat_rows, batch.tokens[sequence, row + 1], is_noisy, torch.ones(len(row)), counts)


def _select_noisy(noisy: NoisyBatch) -> RowSelection:
    sequence, row = noisy.masked.nonzero(as_tuple=True)
    flat_rows = row * len(noisy.masked) + sequence
    counts = LossCounts(clean=0, masked=len(row), maskable=0)
    inverse_p = 1 / noisy.p_mask[sequence, row]
    is_noisy = torch.ones(len(row), dtype=torch.bool)
    return RowSelection(flat_rows, noisy.batch.tokens[sequence, row], is_noisy, inverse_p, counts)


def _concatenate(*parts: RowSelection) -> RowSelection:
    return RowSelection(
        torch.cat([part.rows for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.is_noisy for part in parts]),
        torch.cat([part.inverse_p for part in parts]),
        sum((part.counts for part in parts), start=LossCounts(0, 0, 0)),
    )
