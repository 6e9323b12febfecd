"""The model's forward against transformers' Ministral 3 and against its own definition."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationMixin, StaticCache

from model.hf.cache import PrefixCache


def tokens(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("factor", [16.0, 0.25])
def test_logits_equal_transformers_ministral3(tiny, factor, truncate):
    model = tiny.model(torch.float32, rope={"factor": factor, "truncate": truncate})
    reference = tiny.reference(model)
    ids = tokens(2, 100)  # original_max_position_embeddings is 24
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference(ids).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_logits_equal_transformers_at_far_positions(tiny):
    model = tiny.model(torch.float32)
    ids, positions = tokens(1, 12), torch.arange(300, 312)[None]
    with torch.no_grad():
        theirs = tiny.reference(model)(ids, position_ids=positions).logits
        torch.testing.assert_close(model(ids, position_ids=positions).logits, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_transformers(tiny, side):
    model = tiny.model(torch.float32)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(7, 10)] = 0
    with torch.no_grad():
        ours = model(tokens(2, 10), attention_mask=mask).logits
        theirs = tiny.reference(model)(tokens(2, 10), attention_mask=mask).logits
    assert not ours.isnan().any()
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=0)


def test_loss_is_next_token_cross_entropy(tiny):
    model = tiny.model()
    ids = tokens(2, 9)
    labels = ids.masked_fill(ids < 10, -100)
    output = model(ids, labels=labels)
    expected = cross_entropy(output.logits[:, :-1].reshape(-1, 64).float(), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], output.loss)


def test_hidden_states_are_layer_inputs_and_the_normed_output(tiny):
    model = tiny.model()
    output = model(tokens(1, 5), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.encoder.embed_tokens(tokens(1, 5)))
    assert torch.equal(model.diffusion_head(output.hidden_states[-1]), output.logits)


@pytest.mark.parametrize("make_cache", [lambda: PrefixCache(2), lambda: DynamicCache()], ids=["ours", "transformers"])
def test_cached_forwards_equal_one_uncached_forward(tiny, make_cache):
    model, ids, cache = tiny.model(), tokens(2, 60), make_cache()
    full = model(ids).logits
    with torch.no_grad():
        chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split([7, 1, 1, 20, 31], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-10, rtol=0)
    assert cache.get_seq_length() == 60


def test_cropped_cache_continues_as_if_the_rest_had_never_been(tiny):
    model, ids, cache = tiny.model(), tokens(1, 30), PrefixCache(2, capacity=5)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        cache.crop(9)
        continued = model(ids[:, 12:], past_key_values=cache).logits
        expected = model(torch.cat((ids[:, :9], ids[:, 12:]), dim=1)).logits[:, 9:]
    torch.testing.assert_close(continued, expected, atol=1e-10, rtol=0)


def dense_mask(length, block_start):
    """Return the causal mask, except that tokens from block_start on also see each other."""
    index = torch.arange(length)
    return ((index[None] <= index[:, None]) | (index[:, None] >= block_start))[None, None]


def test_draft_forward_equals_a_dense_mask_in_transformers(tiny):
    model, cache = tiny.model(torch.float32), PrefixCache(2)
    prefix, block = tokens(2, 33), torch.cat((tokens(2, 1, seed=1), torch.full((2, 7), 60)), dim=1)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
        draft = model(block, past_key_values=cache, bidirectional=True, commit=False).logits
        both = torch.cat((prefix, block), dim=1)
        theirs = tiny.reference(model)(both, attention_mask=dense_mask(40 + 1, 33)).logits[:, 33:]
        ours = model(both, attention_mask=dense_mask(40 + 1, 33)).logits[:, 33:]
    torch.testing.assert_close(draft, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(draft, ours, atol=1e-4, rtol=0)


def test_drafts_leave_the_cache_as_it_is(tiny):
    model, cache, ids = tiny.model(), PrefixCache(2), tokens(1, 10)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = model(tokens(1, 3), past_key_values=cache, commit=False).logits
        model(tokens(1, 50, seed=1), past_key_values=cache, bidirectional=True, commit=False)
        after = model(tokens(1, 3), past_key_values=cache, commit=False).logits
    assert cache.length == 10
    assert torch.equal(before, after)


def test_gradients_through_a_draft_equal_those_of_a_dense_mask(tiny):
    model, cache = tiny.model(), PrefixCache(2)
    prefix, block = tokens(1, 11), tokens(1, 4, seed=1)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    weight = model.encoder.layers[0].self_attn.o_proj.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)
    arguments = {"past_key_values": cache, "bidirectional": True, "commit": False}
    draft = model(block, **arguments).logits
    model(tokens(1, 3), **arguments)  # another draft in between spoils nothing
    (gradient,) = torch.autograd.grad(draft.logsumexp(-1).sum(), weight)

    def dense(value):
        """Compute the same, with the prefix recomputed from the original weight."""
        keys_from_prefix = PrefixCache(2)
        model(prefix, past_key_values=keys_from_prefix)
        parameters = {"encoder.layers.0.self_attn.o_proj.weight": value}
        arguments = {"past_key_values": keys_from_prefix, "bidirectional": True, "commit": False}
        return torch.func.functional_call(model, parameters, (block,), arguments).logits.logsumexp(-1).sum()

    step = torch.randn_like(weight) * 1e-6
    with torch.no_grad():
        slope = (dense(weight + step) - dense(weight - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=0)


def test_gradient_checkpointing_changes_nothing(tiny):
    model, ids = tiny.model(), tokens(2, 9)

    def gradients():
        loss = model(ids, labels=ids).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    model.train()
    expected = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), expected)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, use_cache=True)


def test_a_cache_can_be_filled_while_gradients_flow(tiny):
    model, ids = tiny.model(), tokens(1, 12)
    first = model(ids[:, :8], use_cache=True)
    second = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    expected = model(ids).logits[:, 8:]
    torch.testing.assert_close(second, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(second.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters)
    )


@pytest.mark.parametrize(
    "positions", [1, 3, slice(2, 5), slice(0, 0), torch.tensor([4, 0])], ids=["last", "3", "slice", "none", "indices"]
)
def test_only_the_positions_asked_for_reach_the_head(tiny, positions):
    model, ids = tiny.model(), tokens(2, 6)
    full, index = model(ids).logits, slice(-positions, None) if isinstance(positions, int) else positions
    torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, full[:, index])


def test_a_bool_mask_of_positions_gives_flat_logits(tiny):
    model, ids = tiny.model(), tokens(2, 6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, model(ids).logits[mask])


def test_transformers_own_generate_agrees_with_ar(tiny):
    model, prompt = tiny.model(), tokens(1, 5)
    mixin: Any = GenerationMixin
    theirs = mixin.generate(model, prompt, max_new_tokens=12, do_sample=False, suppress_tokens=[60])
    ours, _ = model.ar_generate(prompt, max_new_tokens=12)
    assert torch.equal(ours, theirs)


def test_bfloat16_runs_and_rotary_embedding_stays_exact(tiny):
    model = tiny.model(torch.float32)
    prompt = tokens(1, 200)
    exact = model(prompt).logits
    half = model.to(torch.bfloat16)
    logits = half(prompt).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() < 0.1 * exact.norm()
    for generate in (half.ar_generate, half.generate, half.linear_spec_generate, half.quadratic_spec_generate):
        assert generate(prompt, max_new_tokens=9, eos_token_id=[])[0].shape == (1, 209)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tokens(1, 4), "labels": tokens(1, 4), "logits_to_keep": 1}, "logits_to_keep"),
        ({"input_ids": tokens(1, 4), "output_attentions": True}, "output_attentions"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 3)}, r"attention_mask must be \[batch, 4\]"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.zeros(1, 1, 4, 4)}, "4D attention_mask must be bool"),
    ],
)
def test_contradictory_arguments_are_named(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny.model()(**arguments)


def test_a_cache_of_another_kind_is_refused(tiny):
    model = tiny.model()
    cache = StaticCache(model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache: give a PrefixCache"):
        model(torch.tensor([[3, 4]]), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(torch.tensor([[3, 4]]), past_key_values=DynamicCache(), commit=False)
