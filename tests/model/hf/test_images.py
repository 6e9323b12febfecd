"""Decoding with images: every mode, batches, the draft adapter, decisions."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from model.hf.decoding import decode
from model.hf.layers import DraftAdapter
from model.hf.options import DecodeOptions
from tests.helpers.tiny_vlm import make_mistral3, make_prompts, make_vlm
from tests.model.hf.modes import ALL, SPECULATIVE
from tests.model.hf.trained_models import CONFIG, make_periodic

PROMPTS = [[5, (2, 3), 7, (1, 6)], [9, 8, 7], [(4, 1), 6, 11, 12, 13], [5, 6, (1, 1)], [9]]
TEXT = 22  # ids from here on are neither special nor image tokens
GRIDS = [(1, 1), (2, 3), (3, 2), (1, 4), (4, 2)]
MODES = "ar", "linear", "quadratic"
GREEDY = {"max_new_tokens": 24, "eos_token_id": []}


def make_trained_vlm(trained, dtype=torch.float64, seed=0):
    """Put the weights of the trained text model into a vision-language one: drafts are often right."""
    model = make_vlm(dtype, seed, **CONFIG)
    missing, unexpected = model.load_state_dict(trained.model(dtype).state_dict(), strict=False)
    assert not unexpected and all("vision_tower" in name or "multi_modal" in name for name in missing)
    return model


def make_image_prompts(num_prompts, seed):
    """Make prompts of a repeated pattern with no, one or two images before, in and after it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for _ in range(num_prompts):
        tokens = make_periodic(1, 11, generator)[0].clamp(min=TEXT).tolist()
        for _ in range(int(torch.randint(0, 3, (), generator=generator))):
            grid = GRIDS[int(torch.randint(0, len(GRIDS), (), generator=generator))]
            tokens.insert(int(torch.randint(0, len(tokens) + 1, (), generator=generator)), grid)
        prompts.append(tokens)
    return make_prompts(prompts, seed)


def generate(model, ids, images, mode, mask=None, **options):
    return model.generate(ids, mode=mode, attention_mask=mask, return_dict_in_generate=True, **images, **options)


def count_differences(model, num_prompts, seed, modes=SPECULATIVE):
    """Count the sequences that differ from greedy AR, over all modes, one batch each."""
    prompt = make_image_prompts(num_prompts, seed)
    expected = generate(model, prompt.ids, prompt.images, "ar", prompt.mask, **GREEDY).output_ids
    found = [generate(model, prompt.ids, prompt.images, m, prompt.mask, **GREEDY, **more) for m, more in modes]
    assert len(expected[:, -24:].unique(dim=0)) > num_prompts // 2, "the prompts must matter"
    return sum(int((one.output_ids != expected).any(1).sum()) for one in found)


def test_greedy_speculation_equals_greedy_ar_in_float64(trained):
    assert count_differences(make_trained_vlm(trained), 8, seed=0) == 0
    assert count_differences(make_vlm(seed=1), 4, seed=1) == 0


@pytest.mark.slow
def test_greedy_speculation_equals_greedy_ar_for_200_prompts(trained):
    for seed in range(10):
        model = make_trained_vlm(trained, seed=seed) if seed % 2 else make_vlm(seed=seed)
        assert count_differences(model, 20, seed) == 0


def test_ar_equals_transformers_without_a_cache():
    model, prompt = make_vlm(torch.float32), make_prompts([PROMPTS[0]])
    reference, ids = make_mistral3(model), prompt.ids
    for _ in range(12):
        with torch.no_grad():
            logits = reference(ids, **prompt.images).logits[:, -1]
        logits[:, 60] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.ar_generate(prompt.ids, 12, eos_token_id=[], **prompt.images)[0], ids)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_a_batch_equals_its_prompts_alone(mode, extra):
    model, prompt = make_vlm(), make_prompts(PROMPTS)
    batch = generate(model, prompt.ids, prompt.images, mode, prompt.mask, max_new_tokens=14, eos_token_id=[], **extra)
    for index, (ids, images) in enumerate(prompt.singles):
        alone = generate(model, ids, images, mode, max_new_tokens=14, eos_token_id=[], **extra)
        assert torch.equal(alone.output_ids[0, -14:], batch.output_ids[index, -14:]), index


def test_the_released_entry_points_take_images():
    model, prompt = make_vlm(), make_prompts(PROMPTS)
    given = {"attention_mask": prompt.mask, **prompt.images, "max_new_tokens": 10, "eos_token_id": []}
    entries = {"ar": "ar_generate", "linear": "linear_spec_generate", "quadratic": "quadratic_spec_generate"}
    for mode, entry in entries.items():
        output, num_forwards = getattr(model, entry)(prompt.ids, **given)
        expected = generate(model, prompt.ids, prompt.images, mode, prompt.mask, max_new_tokens=10, eos_token_id=[])
        assert torch.equal(output, expected.output_ids) and num_forwards == expected.num_forwards


def test_an_image_token_that_the_model_writes_is_text():
    """Only the prompt's image tokens stand for features."""
    model, prompt = make_vlm(), make_prompts([PROMPTS[0]])
    with torch.no_grad():
        model.diffusion_head.weight[19] = 3 * model.diffusion_head.weight.abs().amax(0)
        model.encoder.norm.weight.abs_()
    results = [generate(model, prompt.ids, prompt.images, mode, **GREEDY).output_ids for mode in MODES]
    assert (results[0][:, -24:] == 19).any()
    assert all(torch.equal(one, results[0]) for one in results)


def test_the_tower_runs_once_in_a_decode_and_may_be_shared_by_several():
    model, prompt = make_vlm(), make_prompts([PROMPTS[0]])
    calls = []
    model.encoder.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    expected = generate(model, prompt.ids, prompt.images, "linear", **GREEDY).output_ids
    assert len(calls) == 2, "once for each image"
    embeds = model.embed_prompt(prompt.ids, **prompt.images)
    for mode in MODES:
        result = decode(model, mode, prompt.ids, DecodeOptions(**GREEDY), inputs_embeds=embeds)
        assert torch.equal(result.output_ids, expected)
    assert len(calls) == 4
    with pytest.raises(ValueError, match=r"inputs_embeds is .* prompts and model need"):
        decode(model, "ar", prompt.ids, DecodeOptions(), inputs_embeds=embeds[:, 1:])


def test_decisions_see_the_images_of_their_prompt():
    model, prompt = make_vlm(), make_prompts(PROMPTS)
    canvas, candidates = [30, 60, 31, 60], [40, 41, 42]
    batch = model.score_masked(prompt.ids, canvas, candidates, attention_mask=prompt.mask, **prompt.images)
    for index, (ids, images) in enumerate(prompt.singles):
        alone = model.score_masked(ids, canvas, candidates, **images)[0]
        torch.testing.assert_close(batch[index], alone, atol=1e-9, rtol=0)
    others = make_prompts(PROMPTS, seed=1)
    changed = model.score_masked(prompt.ids, canvas, candidates, attention_mask=prompt.mask, **others.images) - batch
    assert (changed.abs().amax((1, 2)) > 1e-3).tolist() == [True, False, True, True, False]


@pytest.fixture
def adapter(tmp_path):
    """Save a draft adapter as the released one is: o_proj by name, weights for the text model alone."""
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["o_proj"], exclude_modules=r".*vision.*")
    wrapped = get_peft_model(make_vlm(), lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    config: Any = wrapped.peft_config["default"]
    config.exclude_modules = None
    wrapped.save_pretrained(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("how", ["load_adapter", "peft"])
def test_a_draft_adapter_drafts_and_leaves_the_tower_alone(adapter, how):
    model, prompt = make_vlm(), make_prompts(PROMPTS)
    plain = {m: generate(model, prompt.ids, prompt.images, m, prompt.mask, **GREEDY) for m in MODES}
    if how == "load_adapter":
        model.load_adapter(str(adapter))
        assert not any("lora" in name for name, _ in model.encoder.vision_tower.named_parameters())
    else:
        PeftModel.from_pretrained(model, str(adapter))
    assert DraftAdapter(model)
    for mode in MODES:
        drafted = generate(model, prompt.ids, prompt.images, mode, prompt.mask, **GREEDY)
        assert torch.equal(drafted.output_ids, plain["ar"].output_ids)
        assert (mode == "ar") == (drafted.acceptance_lengths == plain[mode].acceptance_lengths)
