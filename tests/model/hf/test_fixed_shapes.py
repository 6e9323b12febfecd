"""Decoding with fixed shapes, which a GPU needs to compile forwards, gives the same tokens; it is forced on here."""

import pytest
import torch

from model.hf import cache, session
from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.modes import ALL, pad_left
from tests.model.hf.scripted_model import make_scripted_model


@pytest.fixture
def force_fixed_shapes(monkeypatch):
    """Call it to make every further decode one with fixed shapes."""

    def force():
        monkeypatch.setattr(cache, "needs_fixed_shapes", lambda _: True)

    return force


def run(model, mode, prompt, mask=None, **options):
    return decode(model, mode, prompt, DecodeOptions(**{"max_new_tokens": 30, "eos_token_id": [], **options}), mask)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_tokens_are_the_same(tiny, trained, force_fixed_shapes, mode, extra):
    ids = torch.randint(3, 20, (5, 6), generator=torch.Generator().manual_seed(0))
    cases = [
        (tiny.model(), ids[:1], None),
        (trained.model(), trained.prompts(4, 9), None),
        (make_scripted_model(tiny.model, 0.85), *pad_left(ids, [6, 1, 3, 5, 2])),
    ]
    settings = {"eos_token_id": [7], **extra}
    expected = [run(model, mode, *prompt, **settings) for model, *prompt in cases]
    force_fixed_shapes()
    for (model, *prompt), result in zip(cases, expected, strict=True):
        got = run(model, mode, *prompt, **settings)
        assert torch.equal(got.output_ids, result.output_ids)
        assert got.num_new_tokens == result.num_new_tokens


def watch_shapes(model):
    shapes = set()

    def note(_, inputs):
        hidden, _, visibility, cache, *_ = inputs
        mask = None if visibility.mask is None else tuple(visibility.mask.shape)
        shapes.add((tuple(hidden.shape), mask, cache.num_visible))

    model.encoder.layers[0].register_forward_pre_hook(note)
    return shapes


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_a_long_decode_has_few_shapes(trained, force_fixed_shapes, monkeypatch, mode, extra):
    monkeypatch.setattr(session, "FIRST_CAPACITY", 100)  # doubles once below
    force_fixed_shapes()
    model, prompt = trained.model(), trained.prompts(2, 9)
    shapes = watch_shapes(model)
    run(model, mode, prompt, max_new_tokens=200, **extra)
    # Prefill; then, before and after the cache doubles, one shape of each kind of forward; a threshold cuts drafts to
    # any length of a block, and a few groups to fewer while the draft is shorter than they are many.
    cuts = 8 if "threshold" in extra and mode != "block_diffusion" else 1
    assert len(shapes) <= 1 + 2 * (2 * cuts + 1)


@pytest.mark.parametrize(("mode", "extra"), [ALL[0], ALL[1], ALL[3], ALL[5]], ids=str)
def test_compiled_layers_are_compiled_a_few_times_only(trained, force_fixed_shapes, mode, extra):
    import torch._dynamo as dynamo

    model, prompt = trained.model(), trained.prompts(2, 9)
    force_fixed_shapes()
    expected = run(model, mode, prompt, max_new_tokens=60, **extra)
    dynamo.reset()
    dynamo.utils.counters.clear()
    model.encoder.compile(backend="eager", dynamic=False)
    got = run(model, mode, prompt, max_new_tokens=60, **extra)
    assert torch.equal(got.output_ids, expected.output_ids)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    run(model, mode, prompt, max_new_tokens=60, **extra)
    again = dynamo.utils.counters["stats"]["unique_graphs"]
    dynamo.reset()
    print(mode, "graphs", graphs, again)
    assert graphs <= 8
    assert again == graphs
