"""The work of a sequence, counted from its outline alone, is what the trainer counts of its tokens."""

from dataclasses import replace

import numpy as np
import pytest

from conf.schema import Objective
from data_pipeline.batch import Batch
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Outline, Segments, lay_out
from data_pipeline.work import count_sequence_work
from pretrain.objective.scoring import count_step, score_ar, score_joint

NOISE = NoiseSource(3, "sft", "train", 1e-3)
LENGTH = 256


def draw_segments(seed: int, form: SequenceForm) -> Segments:
    """Draw chats of one to three turns, or texts, until no more fits."""
    generator = np.random.default_rng(seed)
    are_chats, room, document = seed % 3 > 0, form.sequence_length, 0
    parts: list[tuple[int, int, bool]] = []
    while True:
        turns = int(generator.integers(1, 4)) if are_chats else 1
        drawn = [int(count) for count in generator.integers(1, 60, 2 * turns if are_chats else 1)]
        room -= sum(-(-count // form.alignment) * form.alignment for count in drawn)
        if room < 0 and parts:
            break
        if room >= 0:
            parts += [(count, document, are_chats and place % 2 == 0) for place, count in enumerate(drawn)]
        else:
            room = form.sequence_length
        document += room >= 0 and bool(parts)
    lengths, documents, is_prompt = (np.array(column) for column in zip(*parts, strict=True))
    documents = np.unique(documents, return_inverse=True)[1]
    return Segments(generator.integers(3, 90, lengths.sum()), lengths, documents, is_prompt)


def as_trained(batch: Batch, objective: Objective, block_size: int) -> tuple[int, int, int]:
    """Return live blocks, attended pairs and scored positions as the trainer counts them."""
    noisy = add_noise(batch, NOISE, 2)
    is_joint = objective is Objective.joint
    scored = score_joint(noisy) if is_joint else score_ar(batch)
    counts = count_step(batch, scored, noisy.is_live if is_joint else None, 0)
    live = int(noisy.is_live.sum()) // block_size if is_joint else 0
    return live, counts.attended_pairs, counts.clean + counts.masked


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
@pytest.mark.parametrize("objective", list(Objective))
def test_counts_are_those_of_the_trainer(objective: Objective, block_size: int) -> None:
    is_joint = objective is Objective.joint
    found = set()
    for seed in range(40):
        form = SequenceForm(LENGTH, block_size, block_size if is_joint else 1)
        form = replace(form, isolate_documents=seed % 2 == 0, block_padding_loss=seed % 5 > 0)
        segments = draw_segments(seed, form)
        outline = Outline(segments.lengths, segments.documents, segments.is_prompt)
        work = count_sequence_work(outline, form, NOISE if is_joint else None, seed)
        expected = as_trained(lay_out(segments, form, 2, seed), objective, block_size)
        assert (work.live_blocks, work.attended_pairs, work.scored_positions) == expected
        found.add(expected)
    assert len(found) > 30
