"""Streamers of transformers see what is returned, in order, when it is committed."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from model.hf.session import TokenStream

ENTRY_POINTS = ("ar_generate", "generate", "linear_spec_generate", "quadratic_spec_generate")


class Recorder(BaseStreamer):
    """Keeps every call."""

    def __init__(self):
        self.values, self.num_ends = [], 0

    def put(self, value):
        assert (value.dtype, value.device.type) == (torch.int64, "cpu")
        assert not self.num_ends
        self.values.append(value)

    def end(self):
        self.num_ends += 1


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_streamed_tokens_are_the_returned_ones_and_change_nothing(tiny, name, temperature):
    model, prompt = tiny.model(), prompts(1, 6)
    free = model.ar_generate(prompt, 30, eos_token_id=[])[0][0, 6:].tolist()
    for max_new_tokens, eos in ((1, []), (21, []), (40, [free[0]]), (40, [free[5], free[17]])):
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": eos}
        torch.manual_seed(1)
        expected, num_forwards = getattr(model, name)(prompt, **options)
        torch.manual_seed(1)
        recorder = Recorder()
        output, forwards = getattr(model, name)(prompt, **options, streamer=recorder)
        assert torch.equal(output, expected)
        assert forwards == num_forwards
        assert torch.equal(recorder.values[0], prompt)
        assert torch.cat([recorder.values[0][0], *recorder.values[1:]]).tolist() == output[0].tolist()
        assert recorder.num_ends == 1


def test_each_mode_streams_what_it_commits_at_once(tiny, trained):
    model, prompt = tiny.model(), prompts(1, 6)

    def lengths(name, **options):
        recorder = Recorder()
        getattr(model, name)(prompt, 20, eos_token_id=[], streamer=recorder, **options)
        return [len(value) for value in recorder.values[1:]]

    assert lengths("ar_generate") == [1] * 20
    for causal_context in (True, False):
        assert lengths("generate", block_length=8, causal_context=causal_context) == [8, 8, 4]
    model, prompt = trained.model(), trained.prompt(1)
    for mode, name in (("linear", "linear_spec_generate"), ("quadratic", "quadratic_spec_generate")):
        options = DecodeOptions(max_new_tokens=20, eos_token_id=[])
        assert lengths(name) == [1, *decode(model, mode, prompt, options).acceptance_lengths]
        assert max(lengths(name)) > 1


def test_tokens_are_streamed_before_the_next_forward(tiny):
    model, events = tiny.model(), []
    model.encoder.register_forward_hook(lambda *_: events.append("forward"))
    recorder = Recorder()
    recorder.put = lambda value: events.append("put")
    model.ar_generate(prompts(1, 6), 3, eos_token_id=[], streamer=recorder)
    assert events == ["put", "forward", "put", "forward", "put", "forward", "put"]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_batch_with_a_streamer_is_refused_before_anything_is_streamed(tiny, name):
    recorder = Recorder()
    with pytest.raises(ValueError, match="one prompt at a time, got 2"):
        getattr(tiny.model(), name)(prompts(2, 5), streamer=recorder)
    assert not recorder.values


def test_nothing_moves_to_the_host_without_a_streamer():
    stream = TokenStream(None, torch.empty(3, 4, device="meta", dtype=torch.long), (1,))
    stream.put(torch.empty(3, 4, device="meta", dtype=torch.long))
    stream.end()


def word_tokenizer():
    """Return a tokenizer whose token n is the word `w<n>`."""
    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_streamers_of_transformers_work(tiny, name, capsys):
    model, prompt, tokenizer = tiny.model(), prompts(1, 6), word_tokenizer()
    options = {"max_new_tokens": 20, "eos_token_id": []}
    expected = str(tokenizer.decode(getattr(model, name)(prompt, **options)[0][0]))
    getattr(model, name)(prompt, **options, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == expected + "\n"
    queue = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    thread = threading.Thread(target=getattr(model, name), args=(prompt,), kwargs={**options, "streamer": queue})
    thread.start()
    assert "".join(queue) == " ".join(expected.split()[6:])
    thread.join()
