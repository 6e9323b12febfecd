"""The counts of a decode are those of what was computed: forwards, token positions, positions of the head."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.modes import ALL, pad_left
from tests.model.hf.scripted_model import make_scripted_model

PROMPT = torch.tensor([[3, 5, 4]])


class Meter:
    """Watches encoder and head: the positions that each computes in every forward of the encoder."""

    def __init__(self, model):
        self.positions, self.head_positions = [], []
        encode = model.encoder.forward

        def forward(hidden, *rest):
            self.positions.append(hidden.shape[0] * hidden.shape[1])
            self.head_positions.append(0)
            return encode(hidden, *rest)

        model.encoder.forward = forward
        model.diffusion_head.register_forward_hook(self._count_head)

    def _count_head(self, _, inputs, output):
        self.head_positions[-1] += output.flatten(0, -2).shape[0]


def run(model, mode, prompt=PROMPT, mask=None, **options):
    return decode(model, mode, prompt, DecodeOptions(**{"max_new_tokens": 20, "eos_token_id": [], **options}), mask)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
@pytest.mark.parametrize("kind", ["random", "trained", "ragged", "sampled"])
def test_forwards_and_positions_are_those_the_encoder_sees(tiny, trained, mode, extra, kind):
    model = trained.model() if kind == "trained" else tiny.model()
    prompt, mask = (trained.prompt(0), None) if kind == "trained" else (torch.arange(3, 15).view(3, 4), None)
    if kind == "ragged":
        prompt, mask = pad_left(prompt, [4, 1, 3])
    meter = Meter(model)
    sampling = {"temperature": 1.0, "seed": 0} if kind == "sampled" else {}
    result = run(model, mode, prompt, mask, **sampling, **extra)
    assert result.num_forwards == len(meter.positions) == sum(result.forwards.values())
    assert result.num_positions == sum(meter.positions)
    assert result.forwards["prefill"] == 1
    assert result.tokens_per_forward == 20 / len(meter.positions)
    assert result.tokens_per_position == 20 * len(prompt) / sum(meter.positions)


def test_the_head_sees_one_position_per_ar_forward(tiny):
    meter = Meter(model := tiny.model())
    run(model, "ar", PROMPT.expand(2, -1))
    assert meter.head_positions == [2] * 20
    assert meter.positions == [6, *[2] * 19]


def test_the_head_sees_what_is_masked_in_block_diffusion(tiny):
    meter = Meter(model := tiny.model())
    run(model, "block_diffusion", max_new_tokens=10, threshold=1.0)
    assert meter.head_positions == [1, 7, 6, 5, 4, 3, 2, 1, 1, 1]
    assert meter.positions == [3, *[8] * 7, 8, 2]


def test_the_head_sees_drafted_and_verified_positions_in_linear_speculation(tiny):
    meter = Meter(model := make_scripted_model(tiny.model, 1.0))
    run(model, "linear", max_new_tokens=18)
    assert meter.head_positions == [1, 7, 8, 7, 8, 1]
    assert meter.positions == [3, 8, 8, 8, 8, 1]


def test_the_head_sees_verified_positions_and_one_group_in_quadratic_speculation(tiny):
    meter = Meter(model := make_scripted_model(tiny.model, 1.0))
    run(model, "quadratic", max_new_tokens=18)
    assert meter.head_positions == [1 + 7, 8 + 7, 8 + 7, 1]
    assert meter.positions == [3 + 8, 8 * 9, 8 * 9, 1]


@pytest.mark.parametrize("mask_groups", [1, 2, 3])
def test_the_head_sees_one_group_however_many_are_computed(tiny, mask_groups):
    meter = Meter(model := make_scripted_model(tiny.model, 0.9))
    result = run(model, "quadratic", max_new_tokens=40, mask_groups=mask_groups)
    verified = [positions - 8 * mask_groups for positions in meter.positions[1:]]
    for positions, head_positions, num_verified in zip(
        meter.positions[1:], meter.head_positions[1:], verified, strict=True
    ):
        assert head_positions <= (num_verified if num_verified > 0 else positions) + 7
    assert result.num_positions == sum(meter.positions)


def test_results_add_up(tiny):
    for accuracy in (0.3, 0.9):
        model = make_scripted_model(tiny.model, accuracy)
        for mode in ("linear", "quadratic"):
            result = run(model, mode, max_new_tokens=33)
            assert result.num_cycles == len(result.acceptance_lengths)
            assert result.acceptance_length == sum(result.acceptance_lengths) / result.num_cycles
            assert result.num_committed == sum(length - 1 for length in result.acceptance_lengths)
            assert result.commit_ratio == result.num_committed / result.num_proposed
    ar = run(tiny.model(), "ar")
    assert (ar.commit_ratio, ar.acceptance_length, ar.acceptance_lengths) == (None, None, [])


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_caches_grow_without_changing_anything(tiny, monkeypatch, mode, extra):
    """Room for two tokens to begin with, and doubling, against room for all."""
    from model.hf import session as session

    model, (prompt, mask) = tiny.model(), pad_left(torch.arange(3, 15).view(3, 4), [4, 1, 3])
    expected = run(model, mode, prompt, mask, max_new_tokens=70, **extra)
    monkeypatch.setattr(session, "FIRST_CAPACITY", 2)
    got = run(model, mode, prompt, mask, max_new_tokens=70, **extra)
    assert torch.equal(got.output_ids, expected.output_ids)
    assert got.forwards == expected.forwards
