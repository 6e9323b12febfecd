"""A PEFT draft adapter works in drafts and nowhere else."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from model.hf import speculation as speculation
from model.hf.attention_mask import make_group_layout
from model.hf.cache import PrefixCache
from model.hf.decoding import decode
from model.hf.layers import DraftAdapter
from model.hf.options import QUADRATIC, DecodeOptions
from model.hf.session import open_session
from model.hf.speculation import real_context_acceptance
from tests.model.hf.adapters import attach_adapter, fill_adapter
from tests.model.hf.modes import SPECULATIVE
from tests.model.hf.restated import make_exact

GROUPS, MASKS = 3, 4


def prompt():
    return torch.tensor([[5, 9, 11, 40, 3]])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_only_drafts_change(tiny, monkeypatch, task_type):
    plain = tiny.model()
    wrapped = attach_adapter(tiny.model(), task_type=task_type)
    expected, _ = plain.ar_generate(prompt(), 30, eos_token_id=[])
    assert not torch.allclose(wrapped(input_ids=prompt()).logits, plain(prompt()).logits)
    drafts = []
    real = speculation.draft_block
    monkeypatch.setattr(speculation, "draft_block", lambda *a: drafts.append(real(*a)) or drafts[-1])
    assert torch.equal(wrapped.linear_spec_generate(prompt(), 30, eos_token_id=[])[0], expected)
    assert torch.equal(wrapped.quadratic_spec_generate(prompt(), 30, eos_token_id=[])[0], expected)
    assert torch.equal(wrapped.ar_generate(prompt(), 30, eos_token_id=[])[0], expected)
    blocks = {"max_new_tokens": 30, "eos_token_id": []}
    assert torch.equal(wrapped.generate(prompt_ids=prompt(), **blocks)[0], plain.generate(prompt(), **blocks)[0])
    torch.testing.assert_close(drafts[0].tokens, first_draft(plain, wrapped, expected))


def first_draft(plain, wrapped, ar_ids):
    """Return the draft after the prefill, with the adapter on for the block and a prefix made without it."""
    cache, block = PrefixCache(2), torch.full((1, 8), 60)
    block[0, 0] = ar_ids[0, 5]
    with torch.no_grad():
        plain(prompt(), past_key_values=cache)
        block_arguments = {"past_key_values": cache, "bidirectional": True, "commit": False}
        logits = wrapped(input_ids=block, **block_arguments).logits[:, 1:]
        assert not torch.equal(logits.argmax(-1), plain(block, **block_arguments).logits[:, 1:].argmax(-1))
    logits[..., 60] = -torch.inf
    return logits.argmax(-1)


def test_adapter_keys_are_those_of_released_adapters(tiny):
    keys = get_peft_model_state_dict(attach_adapter(tiny.model())).keys()
    assert set(keys) == {
        f"base_model.model.encoder.layers.{layer}.self_attn.o_proj.lora_{side}.weight"
        for layer in range(2)
        for side in "AB"
    }


def test_a_saved_adapter_drafts_after_loading(tiny, tmp_path):
    wrapped = attach_adapter(tiny.model())
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path)
    prefixes = torch.randint(3, 60, (40, 6))
    counts = real_context_acceptance(wrapped, prefixes, 8)
    assert torch.equal(real_context_acceptance(loaded, prefixes, 8), counts)
    with wrapped.disable_adapter():
        assert torch.equal(real_context_acceptance(wrapped, prefixes, 8), plain_counts(tiny, prefixes))
    assert not torch.equal(counts, plain_counts(tiny, prefixes))


def plain_counts(tiny, prefixes):
    return real_context_acceptance(tiny.model(), prefixes, 8)


def test_the_adapter_is_restored_after_an_error(tiny, monkeypatch):
    wrapped = attach_adapter(tiny.model())
    before = wrapped(input_ids=prompt()).logits

    def fail(*_):
        raise RuntimeError("stop here")

    monkeypatch.setattr(speculation, "verify_draft", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        wrapped.linear_spec_generate(prompt(), 30)
    assert torch.equal(wrapped(input_ids=prompt()).logits, before)


def test_a_fine_tune_of_other_projections_stays_on(tiny):
    wrapped = attach_adapter(tiny.model(), targets=("q_proj", "o_proj"))
    expected, _ = wrapped.ar_generate(prompt(), 30, eos_token_id=[])
    assert torch.equal(wrapped.linear_spec_generate(prompt(), 30, eos_token_id=[])[0], expected)
    assert not torch.equal(tiny.model().ar_generate(prompt(), 30, eos_token_id=[])[0], expected)


def test_a_merged_adapter_is_refused(tiny):
    wrapped = attach_adapter(tiny.model())
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="merged into o_proj"):
        wrapped.linear_spec_generate(prompt(), 30)
    with pytest.raises(ValueError, match="unmerge it"):
        wrapped.quadratic_spec_generate(prompt(), 30)


def test_an_adapter_of_another_kind_is_refused(tiny):
    model = tiny.model()
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], use_dora=True))
    with pytest.raises(ValueError, match="no plain LoRA"):
        decode(model, "quadratic", prompt(), DecodeOptions())


class AdaptedPositions(nn.Module):
    """The o_proj of transformers' model, with weight `merged` from position `first` on and its own before."""

    def __init__(self, weight, merged, first):
        super().__init__()
        self.plain, self.merged, self.first = weight, merged, first

    def forward(self, hidden):
        return torch.cat((hidden[:, : self.first] @ self.plain.T, hidden[:, self.first :] @ self.merged.T), dim=1)


def make_adapted_reference(tiny, model, first):
    """Build transformers' model with PEFT's merged o_proj for positions from `first` on; `model` has the adapter."""
    reference, adapted = make_exact(tiny.reference(tiny.model())), model.encoder.layers
    for ours, theirs in zip(adapted, reference.model.layers, strict=True):
        o_proj = ours.self_attn.o_proj
        merged = o_proj.base_layer.weight + o_proj.get_delta_weight("default")
        theirs.self_attn.o_proj = AdaptedPositions(o_proj.base_layer.weight, merged, first)
    return reference


def make_dense_mask(num_prefix):
    """Make the mask [1, 1, T, T] of a prefix, GROUPS verified tokens and as many groups of masks."""
    first_mask = num_prefix + GROUPS
    visible = torch.ones(first_mask + GROUPS * MASKS, first_mask + GROUPS * MASKS, dtype=torch.bool).tril()
    for group in range(GROUPS):
        mine = slice(first_mask + group * MASKS, first_mask + (group + 1) * MASKS)
        visible[mine] = False
        visible[mine, : num_prefix + group + 1] = True
        visible[mine, mine] = True
    return visible[None, None]


def test_in_one_forward_masks_go_through_the_merged_weight_and_no_other_position(tiny):
    model = tiny.model()
    attach_adapter(model)
    session = open_session(model, QUADRATIC, prompt(), None, DecodeOptions())
    with torch.no_grad():
        session.prefill()
        tokens = torch.tensor([[7, 8, 9, *[60] * (GROUPS * MASKS)]])
        layout = make_group_layout(GROUPS - 1, torch.arange(GROUPS)[None], MASKS, is_reused=True)
        hidden = session.model.encode("draft_and_verify", tokens, layout, drafting=slice(GROUPS, None))
        positions = [*range(5 + GROUPS), *(6 + group + mask for group in range(GROUPS) for mask in range(MASKS))]
        arguments = {"attention_mask": make_dense_mask(5), "position_ids": torch.tensor([positions])}
        everything = torch.cat((prompt(), tokens), dim=1)
        expected = make_adapted_reference(tiny, model, 5 + GROUPS).model(everything, **arguments)[0][:, 5:]
        none = make_adapted_reference(tiny, model, 99).model(everything, **arguments)[0][:, 5:]
    torch.testing.assert_close(hidden, expected, atol=1e-7, rtol=0)  # cosines are fp32 in both
    torch.testing.assert_close(hidden[:, :GROUPS], none[:, :GROUPS], atol=1e-7, rtol=0)
    assert ((expected - none)[:, GROUPS:].abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize(("mode", "extra"), SPECULATIVE, ids=str)
def test_the_adapter_changes_acceptance_and_a_suspended_one_does_not(tiny, mode, extra):
    model = tiny.model(vocab_size=8, mask_token_id=7)
    prompts = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    options = DecodeOptions(max_new_tokens=40, eos_token_id=[], **extra)
    plain = decode(model, mode, prompts, options)
    attach_adapter(model)
    adapted = decode(model, mode, prompts, options)
    with DraftAdapter(model).suspended():
        suspended = decode(model, mode, prompts, options)
    assert torch.equal(adapted.output_ids, plain.output_ids)
    assert adapted.acceptance_lengths != plain.acceptance_lengths
    assert suspended.acceptance_lengths == plain.acceptance_lengths
    assert decode(model, mode, prompts, options).acceptance_lengths == adapted.acceptance_lengths


def test_a_model_without_an_adapter_has_none(tiny):
    model = tiny.model()
    assert not DraftAdapter(model)
    attach_adapter(model)
    adapter = DraftAdapter(model)
    assert adapter
    with pytest.raises(RuntimeError, match="stop here"), adapter.suspended():
        assert not DraftAdapter(model)
        raise RuntimeError("stop here")
    assert DraftAdapter(model)


def test_layers_without_the_adapter_are_left_as_they_are(tiny):
    model = tiny.model()
    expected = decode(model, "ar", prompt(), DecodeOptions(max_new_tokens=30, eos_token_id=[])).output_ids
    attach_adapter(model, layers=[1])
    for mode, extra in (("ar", {}), *SPECULATIVE):
        options = DecodeOptions(max_new_tokens=30, eos_token_id=[], **extra)
        assert torch.equal(decode(model, mode, prompt(), options).output_ids, expected)


def test_a_drafter_beside_a_fine_tuning_adapter_leaves_the_latter_on(tiny):
    """The verifier is the model with the fine-tuning adapter alone, as PEFT computes it."""
    model = tiny.model()
    wrapped = attach_adapter(model, ("q_proj", "o_proj"))
    tuned = decode(model, "ar", prompt(), DecodeOptions(max_new_tokens=30, eos_token_id=[])).output_ids
    wrapped.add_adapter("drafter", LoraConfig(r=4, lora_alpha=16, target_modules=["o_proj"]))
    wrapped.base_model.set_adapter(["default", "drafter"])
    fill_adapter(model, "drafter", std=0.5)
    assert DraftAdapter(model)
    for mode, extra in (("ar", {}), *SPECULATIVE):
        options = DecodeOptions(max_new_tokens=30, eos_token_id=[], **extra)
        assert torch.equal(decode(model, mode, prompt(), options).output_ids, tuned)
    with DraftAdapter(model).suspended(), torch.no_grad():
        logits = model(tuned).logits
    assert torch.equal(logits[0, 4:-1].argmax(-1)[:30], tuned[0, 5:])
