"""A sequence against a restatement of the rules, position by position, and against an example drawn by hand."""

import numpy as np
import pytest

from data_pipeline.batch import stack_batches
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, lay_out

FILL = 2
FIELDS = ("tokens", "document_ids", "block_ids", "position_ids", "loss_mask", "block_padding")


def make_segments(kinds: str, lengths: list[int], documents: list[int]) -> Segments:
    """Make segments. kinds: "c" for a prompt, "a" for a response or a text, one letter per segment."""
    tokens = np.arange(100, 100 + sum(lengths))
    is_prompt = np.array([kind == "c" for kind in kinds])
    return Segments(tokens, np.array(lengths), np.array(documents), is_prompt)


def lay_out_slowly(segments: Segments, form: SequenceForm) -> dict[str, list]:
    """Lay out one position after the other, in plain Python."""
    tokens = iter(segments.tokens.tolist())
    out: dict[str, list] = {name: [] for name in FIELDS}

    def add(token: int, document: int, block: int, position: int, loss: bool, block_padding: bool) -> None:
        for name, value in zip(out, (token, document, block, position, loss, block_padding), strict=True):
            out[name].append(value)

    block, position, previous = -1, 0, None
    for length, document, is_prompt in zip(segments.lengths, segments.documents, segments.is_prompt, strict=True):
        document = int(document) if form.isolate_documents else 0
        position = position if document == previous else 0
        previous = document
        for i in range(-(-int(length) // form.alignment) * form.alignment):
            block += i % form.block_size == 0
            if i < length:
                add(next(tokens), document, block, position + i, not is_prompt, False)
            elif is_prompt:
                add(FILL, -1, block, 0, False, False)
            else:
                add(FILL, document, block, position + i, form.block_padding_loss, True)
        position += int(length)
    first = len(out["tokens"])
    for i in range(form.sequence_length - first):
        block += i % form.block_size == 0
        add(FILL, -1, block, 0, False, False)
    return out


CASES = [
    ("aaa", [5, 8, 3], [0, 1, 2]),
    ("a", [32], [0]),
    ("a", [1], [0]),
    ("cacaca", [3, 4, 1, 2, 8, 1], [0, 0, 1, 1, 1, 1]),
    ("ca", [16, 16], [0, 0]),
]


@pytest.mark.parametrize(("kinds", "lengths", "documents"), CASES)
@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("block_padding_loss", [True, False])
def test_positions_follow_the_rules(
    kinds: str, lengths: list[int], documents: list[int], alignment: int, isolate: bool, block_padding_loss: bool
) -> None:
    form = SequenceForm(40, 4, alignment, isolate, block_padding_loss)
    segments = make_segments(kinds, lengths, documents)
    ours, wanted = lay_out(segments, form, FILL), lay_out_slowly(segments, form)
    for name, values in wanted.items():
        assert getattr(ours, name).tolist() == [values], name


def test_a_response_starts_a_block_and_end_of_turn_fills_its_last() -> None:
    batch = lay_out(make_segments("ca", [3, 5], [0, 0]), SequenceForm(16, 4, 4), FILL)
    assert batch.tokens[0].tolist() == [100, 101, 102, FILL, 103, 104, 105, 106, 107, *[FILL] * 7]
    assert batch.document_ids[0].tolist() == [0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1]
    assert batch.block_ids[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0]
    assert batch.loss_mask[0].tolist() == [False] * 4 + [True] * 8 + [False] * 4
    assert batch.block_padding[0].nonzero().flatten().tolist() == [9, 10, 11]


def test_a_batch_holds_int64_and_bool() -> None:
    segments = make_segments("a", [7], [0])
    batch = stack_batches([lay_out(segments, SequenceForm(8, 4, 4), FILL, index) for index in (5, 70000)])
    assert batch.sample_indices.tolist() == [5, 70000]
    dtypes = {name: str(getattr(batch, name).dtype) for name in (*FIELDS, "sample_indices")}
    assert {name for name, dtype in dtypes.items() if dtype == "torch.bool"} == {"loss_mask", "block_padding"}
    assert set(dtypes.values()) == {"torch.bool", "torch.int64"}
    assert batch.to("meta").tokens.device.type == "meta"
