from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from conf.schema import DataConfig, StageConfig
from data_pipeline.batch import Batch
from data_pipeline.dataset import TokenDataset
from data_pipeline.inspect.decode import IdDecoder, TextDecoder
from data_pipeline.inspect.samples import (
    PositionKind,
    Sample,
    Span,
    decode_with_images,
    describe_sample,
    read_samples,
)
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm, build_sequence_form
from model.hf.image_tokens import list_image_tokens
from tests.helpers.packed import pack_chats
from tests.helpers.stored import random_chats, write_dataset

NOISE = NoiseSource(seed=3, stage="joint", split="train", epsilon=StageConfig.noise_epsilon)
FORM = SequenceForm(sequence_length=64, block_size=8, alignment=8)
CHATS = [[[13, 9, 4, 3], [5, 8]], [[30, 7]], [[64]]]  # chats of two responses and one; texts


def open_dataset(path: Path, length: int, has_noise: bool = True) -> TokenDataset:
    form = build_sequence_form(DataConfig(sequence_length=length), 32, has_noise)
    return TokenDataset(path, form, seed=0, shuffle=False)


def texts_of(samples: list[Sample]) -> str:
    spans = [span for sample in samples for span in sample.spans if span.kind is PositionKind.scored]
    return "".join(chunk.text for span in spans for chunk in span.chunks)


def masked_positions(spans: list[Span]) -> list[int]:
    positions = []
    for span in spans:
        position = span.start
        for chunk in span.chunks:
            positions += range(position, position + chunk.num_tokens) if chunk.is_masked else []
            position += chunk.num_tokens
    return positions


@pytest.mark.parametrize("noise", [NOISE, None])
def test_one_epoch_in_order_reads_as_the_documents(
    own_dataset_dir: Path, tokenizer_dir: Path, texts: list[str], noise: NoiseSource | None
) -> None:
    dataset = open_dataset(own_dataset_dir, 4096, has_noise=noise is not None)
    indices = range(dataset.num_sequences)
    samples = list(read_samples(dataset, indices, TextDecoder(tokenizer_dir), noise, num_shown=0))
    assert texts_of(samples) == "".join(f"{text}</s>" for text in texts)
    counts = dataset.counts
    totals = {kind: sum(sample.num_positions[kind] for sample in samples) for kind in PositionKind}
    assert totals == {
        PositionKind.scored: counts.scored_tokens,
        PositionKind.prompt: 0,
        PositionKind.block_padding: counts.block_padding_tokens,
        PositionKind.padding: counts.padding_tokens,
    }
    manifest = dataset.stored.manifest
    assert manifest and totals[PositionKind.scored] == manifest.tokens


@pytest.mark.parametrize("block_padding_loss", [True, False])
@pytest.mark.parametrize("chats", CHATS)
def test_masked_tokens_are_marked_exactly_where_the_noise_is(chats: list[list[int]], block_padding_loss: bool) -> None:
    batch = pack_chats([chats], SequenceForm(64, 8, 8, block_padding_loss=block_padding_loss))
    sample = describe_sample(batch, IdDecoder(), NOISE, num_shown=64)
    expected = add_noise(batch, NOISE, mask_token_id=99)
    assert masked_positions(sample.spans) == np.flatnonzero(expected.masked[0].numpy()).tolist()
    assert sum(sample.num_masked.values()) == int(expected.masked.sum())
    for document in sample.documents.values():
        inside = batch.document_ids[0] == document.number
        assert document.num_masked == int(expected.masked[0][inside].sum())
        assert document.noise
        level, probability = document.noise
        assert probability == pytest.approx((1 - NOISE.epsilon) * level + NOISE.epsilon)
        assert expected.p_mask[0][inside].unique().tolist() == [probability]


def test_spans_change_exactly_where_documents_and_their_parts_do() -> None:
    batch = pack_chats([[[13, 9, 4, 3], [5, 8]]], FORM)
    spans = describe_sample(batch, IdDecoder(), NOISE, num_shown=64).spans
    assert [(span.kind.value, span.document, span.end - span.start) for span in spans] == [
        ("prompt", 0, 13),
        ("padding", -1, 3),
        ("scored", 0, 9),
        ("block padding", 0, 7),
        ("prompt", 0, 4),
        ("padding", -1, 4),
        ("scored", 0, 3),
        ("block padding", 0, 5),
        ("prompt", 1, 5),
        ("padding", -1, 3),
        ("scored", 1, 8),
    ]
    changes = [document for document, _ in groupby(span.document for span in spans if span.document >= 0)]
    assert changes == [0, 1]


def test_only_the_positions_asked_for_become_text_but_all_are_counted() -> None:
    batch = pack_chats([[[13, 9], [5, 17]]], FORM)
    whole = describe_sample(batch, IdDecoder(), NOISE, num_shown=64)
    part = describe_sample(batch, IdDecoder(), NOISE, num_shown=20)
    assert part.spans[-1].end == 20
    assert (part.num_positions, part.documents) == (whole.num_positions, whole.documents)


def test_samples_are_those_of_the_trainer(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "chats", [random_chats(40, 12)], kind="chat")
    dataset = TokenDataset(path, FORM, seed=5)
    (sample,) = read_samples(dataset, [dataset.num_sequences + 3], IdDecoder(), None, num_shown=0)
    batch: Batch = dataset.build_sequence(dataset.num_sequences + 3)
    for span in sample.spans:
        shown = [int(word) for chunk in span.chunks for word in chunk.text.split()]
        inside = slice(span.start, span.end)
        assert shown == ([] if span.kind is PositionKind.padding else batch.tokens[0, inside].tolist())
        if span.kind is PositionKind.scored:
            assert bool(batch.loss_mask[0, inside].all())


def test_the_tokens_of_an_image_are_one_chunk() -> None:
    tokens = [7, *list_image_tokens((1, 2)), *list_image_tokens((2, 1)), 8, 9]
    masked = [False] * (len(tokens) - 1) + [True]
    images = [(1, (1, 2)), (5, (2, 1))]
    chunks = decode_with_images(tokens, masked, IdDecoder(), images)
    assert [(chunk.text, chunk.num_tokens) for chunk in chunks] == [
        ("7 ", 1), ("[image 1 x 2]", 4), ("[image 2 x 1]", 5), ("8 ", 1), ("9 ", 1)
    ]  # fmt: skip
    cut = decode_with_images(tokens[:7], masked[:7], IdDecoder(), images)
    assert [(chunk.text, chunk.num_tokens) for chunk in cut] == [("7 ", 1), ("[image 1 x 2]", 4), ("[image 2 x 1]", 2)]
