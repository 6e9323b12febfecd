"""`model.generate(**inputs, mode=...)` with the habits that other models of transformers have taught."""

import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.hf.decoding import decode
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from model.hf.options import MODES, DecodeOptions
from model.hf.session import DecodeResult
from tests.helpers.tiny_exports import save_tiny_export

ENTRY_POINTS = {"ar": "ar_generate", "linear": "linear_spec_generate", "quadratic": "quadratic_spec_generate"}
PROMPT = torch.tensor([[5, 9, 11, 40]])


def word_tokenizer():
    """Make a tokenizer whose token n is the word `w<n>`; it pads on the left with token 1."""
    words = {"pad" if n == 1 else f"w{n}": n for n in range(64)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="pad", padding_side="left")


@pytest.mark.parametrize("mode", MODES)
def test_what_a_tokenizer_returns_can_be_given(tiny, mode):
    model, texts = tiny.model(), ["w5 w9 w11 w40", "w7", "w8 w3"]
    inputs = word_tokenizer()(texts, return_tensors="pt", padding=True)
    assert {"input_ids", "attention_mask"} <= inputs.keys()
    output, num_forwards = model.generate(**inputs, mode=mode, max_new_tokens=12, eos_token_id=[])
    assert num_forwards > 0
    for index, text in enumerate(texts):
        single = word_tokenizer()([text], return_tensors="pt")
        alone, _ = model.generate(**single, mode=mode, max_new_tokens=12, eos_token_id=[])
        assert output[index, 4:].tolist() == alone[0, -12:].tolist()
    with_types = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    assert torch.equal(model.generate(**with_types, mode=mode, max_new_tokens=12, eos_token_id=[])[0], output)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_those_of_the_entry_points(tiny, mode):
    model = tiny.model()
    expected = decode(model, mode, PROMPT, DecodeOptions(max_new_tokens=15, eos_token_id=[]))
    output, num_forwards = model.generate(PROMPT, 15, eos_token_id=[], mode=mode)
    assert torch.equal(output, expected.output_ids)
    assert num_forwards == expected.num_forwards
    name = ENTRY_POINTS.get(mode, "generate")
    again, forwards = getattr(model, name)(PROMPT, 15, eos_token_id=[])
    assert torch.equal(again, output)
    assert forwards == num_forwards


def test_generate_is_block_diffusion_unless_asked_otherwise(tiny):
    result = tiny.model().generate(PROMPT, 9, eos_token_id=[], return_dict_in_generate=True)
    assert isinstance(result, DecodeResult)
    assert "denoise" in result.forwards


def test_released_signatures_stay_in_their_order(tiny):
    model = tiny.model()
    thinking = "max_thinking_tokens end_think_token_id"
    lengths = "prompt_ids max_new_tokens block_length"
    expected = {
        "ar_generate": f"prompt_ids max_new_tokens temperature eos_token_id {thinking}",
        "generate": f"{lengths} threshold causal_context temperature eos_token_id {thinking}",
        "linear_spec_generate": f"{lengths} temperature mask_token_id eos_token_id {thinking} threshold",
    }
    for name, words in expected.items():
        parameters = inspect.signature(getattr(model, name)).parameters.values()
        positional = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert positional == words.split()


def test_calls_written_for_the_released_models_run(tiny):
    model = tiny.model()
    free, num_forwards = model.ar_generate(PROMPT, 8, 0.0, -1, None, None)
    assert num_forwards == 8
    stops = [int(free[0, 6]), int(free[0, 9])]
    assert model.ar_generate(PROMPT, max_new_tokens=8, temperature=0.0, eos_token_id=stops)[0].shape == (1, 7)
    closed, _ = model.ar_generate(PROMPT, 8, 0.0, -1, 3, 13)
    assert closed[0, 7] == 13
    assert model.generate(PROMPT, 8, 4, None, True, 0.0, -1, 3, 13)[0][0, 7] == 13
    assert model.generate(PROMPT, max_new_tokens=8, block_length=4, threshold=0.9, end_think_token_id=13)[1] > 2
    assert torch.equal(model.linear_spec_generate(PROMPT, 8, 4, 0.0, None, -1, 3, 13, 0.0)[0], closed)
    assert torch.equal(model.linear_spec_generate(PROMPT, 8, 1, eos_token_id=stops)[0], free[:, :7])
    assert torch.equal(model.quadratic_spec_generate(PROMPT, 8, 1, 0.0, eos_token_id=stops)[0], free[:, :7])


@pytest.mark.parametrize("mode", MODES)
def test_do_sample_says_whether_to_sample(tiny, mode):
    model = tiny.model()

    def run(**options):
        return model.generate(PROMPT, 20, eos_token_id=[], mode=mode, **options)[0]

    greedy = run()
    assert torch.equal(run(do_sample=False), greedy)
    assert torch.equal(run(do_sample=False, temperature=0.0), greedy)
    sampled = run(do_sample=True, seed=1)
    assert not torch.equal(sampled, greedy)
    assert torch.equal(sampled, run(temperature=1.0, seed=1))
    assert torch.equal(run(do_sample=True, temperature=0.5, seed=1), run(temperature=0.5, seed=1))
    assert torch.equal(run(do_sample=True, top_k=1, seed=1), greedy) or mode == "block_diffusion"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"do_sample": True, "temperature": 0.0},
            "do_sample=True contradicts temperature=0.0: give a",
        ),
        (
            {"do_sample": False, "temperature": 0.7},
            "do_sample=False contradicts temperature=0.7: leave",
        ),
        ({"do_sample": False, "top_k": 5}, "top_k has no effect at temperature 0: give a temperature above 0"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
        ({"seed": 0}, "seed has no effect at temperature 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_sampling_that_would_not_happen_is_refused(tiny, mode, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.model().generate(PROMPT, 4, mode=mode, **options)


@pytest.mark.parametrize("mode", MODES)
def test_defaults_given_in_full_are_not_refused(tiny, mode):
    """A caller may spell out the released defaults, also those that a mode does not read."""
    model = tiny.model()
    output, _ = model.generate(PROMPT, 9, None, None, True, 0.0, [], mode=mode)
    assert torch.equal(output, model.generate(PROMPT, 9, eos_token_id=[], mode=mode)[0])


@pytest.mark.parametrize("name", ["ar_generate", "generate", "linear_spec_generate", "quadratic_spec_generate"])
def test_an_unknown_option_is_named(tiny, name):
    with pytest.raises(TypeError, match="there is no option num_beams: these models take max_new_tokens, "):
        getattr(tiny.model(), name)(PROMPT, num_beams=4)


def test_prompts_are_given_once(tiny):
    model = tiny.model()
    for arguments in ({}, {"prompt_ids": PROMPT, "input_ids": PROMPT}):
        with pytest.raises(ValueError, match="once, as prompt_ids or as input_ids"):
            model.generate(**arguments)


def test_an_unknown_mode_is_refused(tiny):
    with pytest.raises(ValueError, match="no mode 'beam'"):
        tiny.model().generate(PROMPT, mode="beam")


def test_what_callers_of_any_model_pass_is_taken(tiny):
    expected, _ = tiny.model().generate(PROMPT, 9, mode="linear", eos_token_id=[])
    output, _ = tiny.model().generate(
        input_ids=PROMPT, max_new_tokens=9, mode="linear", eos_token_id=[], pad_token_id=2, use_cache=True
    )
    assert torch.equal(output, expected)


def test_the_readme_batch_works_on_an_export(tmp_path):
    export = save_tiny_export(tmp_path / "export")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    model = NemotronLabsDiffusionModel.from_pretrained(export)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(["The sea", "Why"], return_tensors="pt", padding=True)
    result = model.generate(
        **inputs, mode="quadratic", do_sample=True, top_p=0.9, seed=1, return_dict_in_generate=True, max_new_tokens=8
    )
    assert len(result.num_new_tokens) == 2
