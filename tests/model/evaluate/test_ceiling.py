"""The oracle's forwards where they are known, and what it sees against a forward over the whole sequence."""

from typing import Any

import pytest
import torch

from model.evaluate.ceiling import (
    Ceiling,
    _BlockPredictor,
    add_ceilings,
    count_denoising_forwards,
    measure_ceiling,
    walk_blocks,
)
from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model, make_tiny_model

PROMPT = [5, 120, 130]
WRONG = -1


def test_what_is_right_from_the_start_takes_one_forward() -> None:
    assert count_denoising_forwards([7, 8, 9, 10], lambda _: [7, 8, 9, 10]) == 1
    assert count_denoising_forwards([7], lambda _: pytest.fail("nothing is masked")) == 0


def test_what_is_never_right_takes_a_forward_per_masked_position() -> None:
    seen: list[list[bool]] = []

    def predict(known: list[bool]) -> list[int]:
        seen.append(known)
        return [WRONG] * 4

    assert count_denoising_forwards([7, 8, 9, 10], predict) == 3
    assert seen == [[True] + [True] * n + [False] * (3 - n) for n in range(3)]


def test_a_forward_that_is_right_somewhere_commits_that_alone_and_the_first_one_if_nowhere() -> None:
    """Position 3 is right at once, 2 once 3 is known, 1 never: it gets its token when nothing else is right."""

    def predict(known: list[bool]) -> list[int]:
        return [7, WRONG, 9 if known[3] else WRONG, 10]

    assert count_denoising_forwards([7, 8, 9, 10], predict) == 3


@pytest.mark.parametrize(
    ("is_right", "num_tokens", "expected"),
    [
        (True, 33, Ceiling(33, 1, 4, 4)),  # four full blocks and a lone seed, which nothing masked follows
        (False, 33, Ceiling(33, 1, 28, 4)),
        (True, 32, Ceiling(32, 1, 4, 3)),  # the last block needs no commit
        (True, 1, Ceiling(1, 1, 0, 0)),
        (False, 11, Ceiling(11, 1, 7 + 2, 1)),
    ],
)
def test_counts_of_whole_responses(is_right: bool, num_tokens: int, expected: Ceiling) -> None:
    response = list(range(100, 100 + num_tokens))

    def open_block(start: int, target: list[int], length: int) -> Any:
        assert target == response[start : start + 8]
        assert length == min(8, 40 - start)
        return lambda _: target if is_right else [WRONG] * length

    assert walk_blocks(response, 8, 40, open_block) == expected


def test_both_ratios_and_sums() -> None:
    both = add_ceilings([Ceiling(33, 1, 4, 4), Ceiling(7, 1, 6, 0)])
    assert both == Ceiling(40, 2, 10, 4)
    assert both.tokens_per_forward == 40 / 16
    assert both.tokens_per_forward_without_commits == 40 / 12


def measure(model: Any, num_tokens: int, max_new_tokens: int) -> Ceiling:
    response = [REPEATED_TOKEN] * num_tokens
    return measure_ceiling(model, PROMPT, response, block_length=8, max_new_tokens=max_new_tokens)


def test_a_model_that_is_always_right_needs_what_its_own_sampler_does_at_threshold_0() -> None:
    model = make_repetitive_model()
    options = DecodeOptions(max_new_tokens=33, block_length=8, threshold=0.0, eos_token_id=[])
    sampled = decode(model, "block_diffusion", torch.tensor([PROMPT]), options)
    ceiling = measure(model, 33, 33)
    assert sampled.output_ids[0, 3:].tolist() == [REPEATED_TOKEN] * 33
    found = {"prefill": ceiling.num_prefills, "denoise": ceiling.num_denoising, "commit": ceiling.num_commits}
    assert found == sampled.forwards
    assert ceiling.tokens_per_forward == sampled.tokens_per_forward == 33 / 9


def test_a_model_whose_masks_predict_something_else_gets_one_position_per_forward() -> None:
    model = make_repetitive_model()
    with torch.no_grad():  # what a mask says of its own position is the opposite of what a token says of the next
        model.encoder.embed_tokens.weight[model.config.mask_token_id] = -50.0
    options = DecodeOptions(max_new_tokens=33, eos_token_id=[])
    assert decode(model, "ar", torch.tensor([PROMPT]), options).output_ids[0, 3:].tolist() == [REPEATED_TOKEN] * 33
    assert measure(model, 33, 33) == Ceiling(33, 1, 4 * 7, 4)
    # Stopped after 11 tokens though there was room for 33: what lies after it is context, not work.
    assert measure(model, 11, 33) == Ceiling(11, 1, 7 + 2, 1)


def test_blocks_see_what_a_forward_over_the_whole_sequence_shows_them() -> None:
    model: Any = make_tiny_model().double()
    mask = model.config.mask_token_id
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(120, 300, (19,), generator=generator).tolist()
    with torch.no_grad():
        reader = _BlockPredictor(model, PROMPT, response)
        for start in (16, 8, 0):  # from the last block to the first, as `walk_blocks` does
            target = response[start : start + 8]
            length, first = min(8, 24 - start), len(PROMPT) + start
            predict = reader.open(start, target, length)
            for _ in range(3):
                known = [True, *(torch.rand(len(target) - 1, generator=generator) < 0.5).tolist()]
                block = [token if is_known else mask for token, is_known in zip(target, known, strict=True)]
                block += [mask] * (length - len(target))
                tokens = torch.tensor([PROMPT + response[:start] + block])
                visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
                visible[first:] = True
                logits = model(tokens, attention_mask=visible[None, None]).logits[0, first:]
                logits[:, mask] = -torch.inf
                assert predict(known) == logits.argmax(-1).tolist()
