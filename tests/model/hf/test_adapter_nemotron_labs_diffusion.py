"""A PEFT draft adapter works in drafts and nowhere else."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from model.hf import speculation_nemotron_labs_diffusion as speculation
from model.hf.cache_nemotron_labs_diffusion import PrefixCache
from model.hf.speculation_nemotron_labs_diffusion import real_context_acceptance


def attach(model, targets=("o_proj",), task_type=None):
    """A random LoRA strong enough to change most argmaxes."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), task_type=task_type)
    wrapped = get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    return wrapped


def prompt():
    return torch.tensor([[5, 9, 11, 40, 3]])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_only_drafts_change(tiny, monkeypatch, task_type):
    plain = tiny.model()
    wrapped = attach(tiny.model(), task_type=task_type)
    expected, _ = plain.ar_generate(prompt(), 30, eos_token_id=[])
    assert not torch.allclose(wrapped(input_ids=prompt()).logits, plain(prompt()).logits)
    drafts = []
    real = speculation.draft_block
    monkeypatch.setattr(speculation, "draft_block", lambda *a: drafts.append(real(*a)) or drafts[-1])
    assert torch.equal(wrapped.linear_spec_generate(prompt(), 30, eos_token_id=[])[0], expected)
    assert torch.equal(wrapped.ar_generate(prompt(), 30, eos_token_id=[])[0], expected)
    blocks = {"max_new_tokens": 30, "eos_token_id": []}
    assert torch.equal(wrapped.generate(prompt_ids=prompt(), **blocks)[0], plain.generate(prompt(), **blocks)[0])
    torch.testing.assert_close(drafts[0].tokens, first_draft(plain, wrapped, expected))


def first_draft(plain, wrapped, ar_ids):
    """The draft after the prefill, with the adapter on for the block and a prefix made without it."""
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
    keys = get_peft_model_state_dict(attach(tiny.model())).keys()
    assert set(keys) == {
        f"base_model.model.encoder.layers.{layer}.self_attn.o_proj.lora_{side}.weight"
        for layer in range(2)
        for side in "AB"
    }


def test_a_saved_adapter_drafts_after_loading(tiny, tmp_path):
    wrapped = attach(tiny.model())
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
    wrapped = attach(tiny.model())
    before = wrapped(input_ids=prompt()).logits

    def fail(*_):
        raise RuntimeError("stop here")

    monkeypatch.setattr(speculation, "verify", fail)
    with pytest.raises(RuntimeError, match="stop here"):
        wrapped.linear_spec_generate(prompt(), 30)
    assert torch.equal(wrapped(input_ids=prompt()).logits, before)


def test_a_fine_tune_of_other_projections_stays_on(tiny):
    wrapped = attach(tiny.model(), targets=("q_proj", "o_proj"))
    expected, _ = wrapped.ar_generate(prompt(), 30, eos_token_id=[])
    assert torch.equal(wrapped.linear_spec_generate(prompt(), 30, eos_token_id=[])[0], expected)
    assert not torch.equal(tiny.model().ar_generate(prompt(), 30, eos_token_id=[])[0], expected)


def test_a_merged_adapter_is_refused(tiny):
    wrapped = attach(tiny.model())
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="merged into o_proj"):
        wrapped.linear_spec_generate(prompt(), 30)
