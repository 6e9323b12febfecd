"""The vision-language model's forward against transformers' Mistral 3 with the same weights."""

import re
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from model.hf.cache import PrefixCache
from model.hf.image_processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMImageProcessor
from model.hf.image_tokens import expand_image_tokens
from tests.helpers.tiny_vlm import LONGEST_EDGE, make_mistral3, make_prompts, make_vlm

PLACES = {
    "first": [(2, 3), 5, 6, 7, 8],
    "last": [5, 6, 7, (3, 1)],
    "middle": [5, 6, (6, 6), 9, 33],
    "several": [5, (1, 1), 6, (2, 4), (4, 2), 44, 45],
    "nothing else": [(2, 2), (1, 5)],
}


def compare_logits(model, ids, images, mask=None):
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, **images).logits
        theirs = make_mistral3(model)(ids, attention_mask=mask, **images).logits
    assert theirs.std() > 0.5
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(ours[counted], theirs[counted], atol=1e-4, rtol=0)
    return ours


@pytest.mark.parametrize("place", PLACES)
def test_logits_equal_transformers_mistral3(place):
    model = make_vlm(torch.float32)
    prompt = make_prompts([PLACES[place]])
    with_images = compare_logits(model, prompt.ids, prompt.images)
    with torch.no_grad():
        assert (model(prompt.ids).logits - with_images).abs().max() > 0.1, "the images must matter"


def test_a_padded_batch_with_different_numbers_and_sizes_of_images_equals_transformers():
    prompt = make_prompts([[5, (2, 3), 7, (1, 6)], [9, 8, 7], [(4, 1), 6, 11, 12, 13]])
    compare_logits(make_vlm(torch.float32), prompt.ids, prompt.images, prompt.mask)


@pytest.mark.parametrize("sizes", [[(50, 91)], [(300, 299), (1, 30), (29, 57)]], ids=str)
def test_pictures_of_any_size_equal_transformers(sizes):
    processor = NemotronLabsDiffusionVLMImageProcessor(longest_edge=LONGEST_EDGE)
    pictures = [Image.effect_noise(size, 90) for size in sizes]
    images = processor(pictures)
    tokens = [5, *[token for index in range(len(sizes)) for token in (18, 30 + index)], 7]
    ids = torch.tensor([expand_image_tokens(tokens, processor.list_grids(images["image_sizes"]))])
    compare_logits(make_vlm(torch.float32), ids, dict(images))


def test_gradients_equal_autograd_through_transformers():
    prompt = make_prompts([[5, (2, 3), 7, 9, (1, 1), 8, 6]])
    model = make_vlm(torch.float32)
    reference = make_mistral3(model)
    for one in (model, reference):
        logits = one(prompt.ids, **prompt.images).logits
        cross_entropy(logits[0, :-1], prompt.ids[0, 1:]).backward()
    theirs = dict(reference.model.named_parameters())
    names = [name for name, _ in model.named_parameters() if "vision_tower" in name or "projector" in name]
    assert len(names) == 2 + 2 * 9 + 4
    for name in names:
        mine, other = model.get_parameter(name).grad, theirs[name.removeprefix("encoder.")].grad
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3, msg=name)


def test_a_cached_forward_continues_a_prompt_with_images():
    model, cache = make_vlm(), PrefixCache(2)
    prompt = make_prompts([[5, (2, 3), 7, 9, 8, 6]])
    with torch.no_grad():
        whole = model(prompt.ids, **prompt.images).logits
        first = model(prompt.ids[:, :-3], past_key_values=cache, **prompt.images).logits
        rest = model(prompt.ids[:, -3:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-10, rtol=0)


def test_the_tensors_are_the_released_ones():
    names = {name for name, _ in make_vlm().named_parameters()}
    layer = [f"{norm}_norm" for norm in ("attention", "ffn")] + [f"attention.{side}_proj" for side in "qkvo"]
    layer += [f"feed_forward.{part}_proj" for part in ("gate", "up", "down")]
    vision = {f"transformer.layers.{index}.{part}" for index in range(2) for part in layer} | {"patch_conv", "ln_pre"}
    projector = {"norm", "patch_merger.merging_layer", "linear_1", "linear_2"}
    expected = {f"encoder.vision_tower.{name}.weight" for name in vision}
    expected |= {f"encoder.multi_modal_projector.{name}.weight" for name in projector}
    assert {name for name in names if re.search("vision|modal", name)} == expected
    assert len(names) - len(expected) == 9 * 2 + 3


def measure_error(model, exact, images):
    with torch.no_grad():
        found, expected = (
            one.compute_image_features(images["pixel_values"], images["image_sizes"].tolist()).double()
            for one in (model, exact)
        )
    return float((found - expected).norm() / expected.norm())


def test_the_tower_computes_in_fp32_unless_asked_otherwise():
    """In bf16 what the tower says is off by percents, its weights' rounding aside; the activations are large."""
    images = make_prompts([[(6, 6), (3, 4)]]).images
    shape: dict[str, Any] = {
        "vision": {"num_hidden_layers": 24, "hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    }
    model = make_vlm(torch.bfloat16, **shape)
    exact, rounded = make_vlm(torch.float64, **shape), make_vlm(torch.bfloat16, **shape)
    exact.load_state_dict(model.state_dict())
    rounded._tower_dtype = torch.bfloat16
    assert measure_error(model, exact, images) < 1e-4
    in_bf16 = measure_error(rounded, exact, images)
    print(f"features of a tower of 24 layers in bf16: {100 * in_bf16:.1f}% from fp32")
    assert 1e-3 < in_bf16 < 1


def test_a_model_cast_to_bf16_keeps_the_positions_of_its_patches():
    model = make_vlm(torch.float32)
    exact = make_vlm(torch.float32)
    exact.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    assert measure_error(model.bfloat16(), exact, make_prompts([[(6, 6)]]).images) < 1e-6


IMAGES = make_prompts([[5, (2, 3), 7]]).images
BAD_IMAGES = {
    "missing sizes": ({"pixel_values": IMAGES["pixel_values"]}, "give pixel_values and image_sizes together"),
    "missing pixels": ({"image_sizes": IMAGES["image_sizes"]}, "give pixel_values and image_sizes together"),
    "another shape": (IMAGES | {"pixel_values": torch.zeros(3, 56, 84)}, r"must be a tensor \[images, 3, height"),
    "another number": (IMAGES | {"image_sizes": torch.tensor([[56, 84]] * 2)}, "height and width of 1 images"),
    "no multiple": (IMAGES | {"image_sizes": torch.tensor([[56, 83]])}, "56 x 83: sides must be multiples of 28"),
    "no pixels": (IMAGES | {"image_sizes": torch.tensor([[0, 84]])}, "0 x 84: sides must be multiples of 28"),
    "larger than its pixels": (IMAGES | {"image_sizes": torch.tensor([[84, 84]])}, "larger than its pixel_values"),
    "turned": (
        {"pixel_values": torch.zeros(1, 3, 84, 56), "image_sizes": [[84, 56]]},
        "rows of other lengths: the sizes or the order of the images differ",
    ),
    "too many": (
        {"pixel_values": torch.zeros(2, 3, 56, 84), "image_sizes": [[56, 84]] * 2},
        r"hold 1 images with 6 <\|image_pad\|>, the images given are 2 with 12 features",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize("entry", ["forward", "generate", "ar_generate", "score_masked"])
def test_bad_images_give_one_clear_error(case, entry):
    model, prompt = make_vlm(), make_prompts([[5, (2, 3), 7]])
    images, message = BAD_IMAGES[case]
    arguments = {"score_masked": ([60], [5])}.get(entry, ())
    with pytest.raises(ValueError, match=message):
        getattr(model, entry)(prompt.ids, *arguments, **images)


def test_image_tokens_without_images_are_refused():
    prompt = make_prompts([[5, (2, 3), 7]])
    for call in (make_vlm().generate, make_vlm().linear_spec_generate):
        with pytest.raises(ValueError, match=r"hold 6 image tokens \(id 19\) but no images"):
            call(prompt.ids)


def test_an_image_larger_than_the_tower_is_refused():
    prompt = make_prompts([[(7, 1), 5]])
    with pytest.raises(ValueError, match=r"196 x 28, larger than .* the tower's 168 pixels"):
        make_vlm().generate(prompt.ids, **prompt.images)


def test_images_need_tokens():
    prompt = make_prompts([[5, (2, 3), 7]])
    with pytest.raises(ValueError, match="images need input_ids"):
        make_vlm()(inputs_embeds=torch.zeros(1, 9, 24), **prompt.images)


@pytest.mark.parametrize("entry", ["generate", "ar_generate", "linear_spec_generate", "quadratic_spec_generate"])
def test_a_text_only_model_refuses_images(tiny, entry):
    prompt = make_prompts([[5, (2, 3), 7]])
    with pytest.raises(ValueError, match="reads text alone, no images: leave pixel_values and image_sizes out"):
        getattr(tiny.model(), entry)(prompt.ids, **prompt.images)


def test_gradient_checkpointing_of_a_rounded_tower_is_refused():
    prompt = make_prompts([[5, (2, 3), 7]])
    model = make_vlm(torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would recompute images"):
        model(prompt.ids, **prompt.images)
    model.float()
    model(prompt.ids, **prompt.images, use_cache=False).logits.sum().backward()
    assert model.encoder.vision_tower.patch_conv.weight.grad.abs().max() > 0
