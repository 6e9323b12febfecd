"""Messages, limits, interruptions and counts of one conversation."""

import json
from dataclasses import replace

import pytest
import torch

from conf.system.errors import UserError
from model.chat import session as session_module
from model.chat.chat_model import load_chat_model
from model.chat.session import ChatOptions, ChatSession, ResponseStreamer
from model.hf.options import MODES


@pytest.fixture(scope="module")
def chat_model(export):
    return load_chat_model(export, device="cpu")


def make_session(chat_model, mode="linear", max_new_tokens=20, system=None, **options):
    return ChatSession(chat_model, ChatOptions(mode, max_new_tokens, **options), system)


def render(chat_model, messages):
    """Render the conversation and tokenise its text with transformers."""
    text = chat_model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return chat_model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.mark.parametrize("mode", MODES)
def test_a_response_is_what_the_entry_point_returns_for_the_rendered_chat(chat_model, mode):
    session, written = make_session(chat_model, mode, system="Be brief."), []
    first = session.ask("Tell me a story", written.append)
    assert "".join(written) == first.text
    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story"}]
    prompt_ids = render(chat_model, opening)
    assert 10 in prompt_ids and 11 in prompt_ids  # <|im_start|>, <|im_end|>
    expected, num_forwards = chat_model.model.generate(prompt_ids, 20, mode=mode)
    assert first.text == chat_model.tokenizer.decode(expected[0, prompt_ids.shape[1] :])
    assert (first.mode, first.new_tokens, first.num_forwards, first.stopped) == (mode, 20, num_forwards, "length")
    assert first.tokens_per_forward == 20 / num_forwards
    assert first.seconds > 0
    history = [*opening, {"role": "assistant", "content": first.text}]
    assert session.messages == history
    second = session.ask("Why?")
    again = render(chat_model, [*history, {"role": "user", "content": "Why?"}])
    expected, _ = chat_model.model.generate(again, 20, mode=mode)
    assert second.text == chat_model.tokenizer.decode(expected[0, again.shape[1] :])
    session.reset()
    assert session.messages == opening[:1]


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_ends_the_response_and_is_not_text(chat_model, mode):
    prompt_ids = render(chat_model, [{"role": "user", "content": "Why?"}])
    free = chat_model.model.ar_generate(prompt_ids, 20)[0][0, prompt_ids.shape[1] :].tolist()
    stop = free[9] if mode != "block_diffusion" else free[0]
    session, written = make_session(replace(chat_model, stop_ids=(11, stop)), mode), []
    response = session.ask("Why?", written.append)
    assert response.stopped == "eos"
    assert response.new_tokens == free.index(stop) + 1
    assert response.text == "".join(written) == chat_model.tokenizer.decode(free[: free.index(stop)])


def test_options_reach_the_decoder(chat_model):
    everything = make_session(chat_model, "block_diffusion", 16, threshold=0.0, block_length=16)
    assert everything.ask("Why?").num_forwards == 1 + 1
    single = make_session(chat_model, "block_diffusion", 16, threshold=1.0, block_length=4)
    assert single.ask("Why?").num_forwards == 1 + 4 * 3 + 3
    single.set_mode("ar")
    assert single.ask("Why?").tokens_per_forward == 1.0
    with pytest.raises(UserError, match="there is no mode 'cubic': choose ar, block_diffusion, linear, quadratic"):
        single.set_mode("cubic")


def test_sampling_follows_the_seed(chat_model):
    def sample(seed):
        torch.manual_seed(seed)
        return make_session(chat_model, temperature=1.5).ask("Why?").text

    assert sample(3) == sample(3) != sample(4)


def test_bad_prompts_leave_the_conversation_as_it_was(chat_model):
    session = make_session(chat_model)
    for prompt, message in (
        ("  \n", "the prompt is empty"),
        ("\udcff", "not valid UTF-8"),
        ("the sea " * 300, r"has \d+ tokens, but the model only 256 positions"),
    ):
        with pytest.raises(UserError, match=message):
            session.ask(prompt)
    assert session.messages == []
    with pytest.raises(UserError, match="--system is empty"):
        make_session(chat_model, system="")


def test_a_response_ends_where_the_positions_end(chat_model):
    response = make_session(chat_model, max_new_tokens=10**6).ask("Why?")
    prompt_ids = render(chat_model, [{"role": "user", "content": "Why?"}])
    assert (response.new_tokens, response.stopped) == (256 - prompt_ids.shape[1], "length")


def test_a_template_that_refuses_is_quoted(chat_model, copy_export):
    (copy_export / "chat_template.jinja").write_text("{{ raise_exception('no system messages, please') }}")
    session = make_session(load_chat_model(copy_export, device="cpu"), system="Be brief.")
    with pytest.raises(UserError, match="chat template rejects the messages: no system messages, please"):
        session.ask("Why?")


def test_an_interrupted_response_stays_as_far_as_it_was_shown(chat_model):
    session, written = make_session(chat_model, "ar", 50), []
    calls = iter(range(100))

    def interrupt(*_):
        if next(calls) == 12:
            raise KeyboardInterrupt

    hook = chat_model.model.encoder.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.ask("Why?", written.append)
    finally:
        hook.remove()
    prompt_ids = render(chat_model, [{"role": "user", "content": "Why?"}])
    expected = chat_model.tokenizer.decode(chat_model.model.ar_generate(prompt_ids, 12)[0][0, prompt_ids.shape[1] :])
    assert session.messages[-1] == {"role": "assistant", "content": expected}
    assert "".join(written) == expected


def test_a_response_interrupted_before_its_first_token_is_forgotten(chat_model):
    session = make_session(chat_model)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = chat_model.model.encoder.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.ask("Why?")
    finally:
        hook.remove()
    assert session.messages == []


def test_parts_of_a_character_are_never_shown(chat_model):
    text = "the naïve 🐳 swims\n日本 ends"
    tokens, written = chat_model.tokenizer(text).input_ids, []
    assert len(chat_model.tokenizer("🐳").input_ids) == 4  # one token per byte
    streamer = ResponseStreamer(chat_model.tokenizer, (11,), written.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in [*tokens, 11]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(written) == streamer.text == text
    assert len(written) > 4
    assert "\ufffd" not in "".join(written)


def test_thinking_marks_are_text(chat_model):
    written = []
    streamer = ResponseStreamer(chat_model.tokenizer, (11,), written.append)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([12, *chat_model.tokenizer("the sea").input_ids, 13, 11]))
    streamer.end()
    assert "".join(written) == streamer.text == "<think>the sea</think>"
    assert json.dumps(streamer.text)


def test_a_thinking_budget_is_of_the_tokenizers_own_think_tokens(chat_model, monkeypatch):
    """Also a budget of nothing; without such tokens it is refused before the first question."""
    begin, end = (chat_model.tokenizer.get_vocab()[token] for token in ("<think>", "</think>"))
    seen = []
    monkeypatch.setattr(session_module, "decode", lambda *arguments: seen.append(arguments[3]) or 1 / 0)
    for budget in (None, 0):
        with pytest.raises(ZeroDivisionError):
            make_session(chat_model, thinking_budget=budget).ask("Why?")
    moved = {"<think>": begin + 5, "</think>": end + 5}
    monkeypatch.setattr(type(chat_model.tokenizer), "get_vocab", lambda _: moved)
    with pytest.raises(ZeroDivisionError):
        make_session(chat_model, thinking_budget=0).ask("Why?")
    assert [options.thinking_budget for options in seen] == [None, 0, 0]
    assert [options.think_token_ids for options in seen[1:]] == [(begin, end), (begin + 5, end + 5)]
    monkeypatch.setattr(type(chat_model.tokenizer), "get_vocab", lambda _: {})
    with pytest.raises(UserError, match="has no <think>: leave the thinking budget out"):
        make_session(chat_model, thinking_budget=0)
