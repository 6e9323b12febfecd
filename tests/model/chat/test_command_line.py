"""The command as a user meets it: one response, a conversation, errors."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.chat.__main__ import main

ROOT = Path(__file__).parents[3]


def run(*arguments, stdin=""):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=120)


def test_one_response_as_json_from_another_process(copy_export, add_adapter):
    add_adapter(copy_export)
    done = run("-m", "model.chat", copy_export, "--prompt", "-", "--json", "--max-new-tokens", "12", stdin="Why? é\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    values = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (values["prompt"], values["mode"]) == ("Why? é", "linear")
    assert (values["new_tokens"], values["stopped"]) == (12, "length")
    assert values["tokens_per_forward"] == 12 / values["num_forwards"]
    assert values["tokens_per_second"] == pytest.approx(12 / values["seconds"])
    assert isinstance(values["text"], str)


def test_a_reader_that_has_gone_is_no_traceback(export):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "model.chat", str(export), "--prompt", "Why?", "--max-new-tokens", "3"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, "error: nobody reads standard output any more\n")


def test_help_needs_no_torch_and_the_chat_no_hydra(export):
    script = (
        "import runpy, sys\nsys.argv = ['chat', *{!r}]\n"
        "try:\n    runpy.run_module('model.chat', run_name='__main__')\n"
        "except SystemExit as done:\n    heavy = {{'torch', 'transformers', 'hydra'}}\n"
        "    print(done.code, sorted(heavy & set(sys.modules)))"
    )
    shown = run("-c", script.format(["--help"]))
    assert shown.stdout.endswith("0 []\n"), shown.stderr
    assert "examples:" in shown.stdout
    assert run("-c", script.format([str(export), "--prompt", ""])).stdout == "2 []\n"
    answered = run("-c", script.format([str(export), "--prompt", "Why?", "--max-new-tokens", "2"]))
    assert answered.stdout.endswith("0 ['torch', 'transformers']\n"), answered.stderr


def test_one_response_goes_to_stdout_and_its_numbers_to_stderr(export, capsys):
    arguments = [str(export), "--device", "cpu", "--prompt", "Why?", "--max-new-tokens", "8"]
    texts = []
    for mode in ("ar", "linear", "quadratic"):
        assert main([*arguments, "--mode", mode]) == 0
        out, err = capsys.readouterr()
        assert "8 tokens · " in err and "tokens/forward" in err and "forwards" not in out
        texts.append(out)
    assert texts[0] == texts[1]
    assert main([*arguments, "--mode", "ar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == texts[0]


def test_a_seed_repeats_a_sampled_response(export, capsys):
    arguments = [str(export), "--device", "cpu", "--prompt", "Why?", "--max-new-tokens", "16", "--temperature", "1.5"]
    texts = []
    for seed in ("7", "7", "8"):
        assert main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def converse(monkeypatch, capsys, export, lines, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = main([str(export), "--device", "cpu", "--max-new-tokens", "6", *options])
    return status, capsys.readouterr().out


def test_a_conversation_with_commands(export, monkeypatch, capsys):
    lines = ["Why?", "", "/mode ar", "Why?", "/reset", "Why?", "/mode", "/mode nonsense", "/etc/passwd", "/exit", "no"]
    status, out = converse(monkeypatch, capsys, export, lines)
    assert status == 0
    assert out.count("6 tokens · ") == 3
    assert out.count("6 tokens · 6 forwards · 1.00 tokens/forward · ") == 2
    assert "mode linear · /image FILE, /reset" in out
    assert "new conversation" in out
    assert "mode ar (of ar, block_diffusion, linear, quadratic)" in out
    assert "error: there is no mode 'nonsense'" in out
    assert "error: there is no command '/etc/passwd'" in out
    turns = [turn.partition("\n")[0] for turn in out.split("> ")]
    assert turns[1] != turns[4]  # the second answer knows the first turn
    assert turns[1] == turns[6]  # greedy speculation and AR agree on a new conversation


def test_the_end_of_the_input_ends_the_chat(export, monkeypatch, capsys):
    status, out = converse(monkeypatch, capsys, export, ["Why?"])
    assert (status, out.count("6 tokens · ")) == (0, 1)


def test_a_conversation_that_became_too_long_can_begin_anew(export, monkeypatch, capsys):
    long = "the sea is wide and blue " * 40
    status, out = converse(monkeypatch, capsys, export, [long, "Why?", "/exit"])
    assert status == 0
    assert "start a new conversation (/reset)" in out
    assert out.count("6 tokens · ") == 1


def test_ctrl_c_ends_the_response_but_not_the_chat(export, monkeypatch, capsys):
    from model.chat import chat_model

    real = chat_model.load_chat_model
    calls = iter(range(100))

    def interrupt(*_):
        if next(calls) == 3:
            raise KeyboardInterrupt

    def load_and_interrupt(*arguments, **options):
        loaded = real(*arguments, **options)
        loaded.model.encoder.register_forward_pre_hook(interrupt)
        return loaded

    monkeypatch.setattr(chat_model, "load_chat_model", load_and_interrupt)
    status, out = converse(monkeypatch, capsys, export, ["Why?", "Why?", "/exit"], "--mode", "ar")
    assert status == 0
    assert out.count("interrupted") == 1
    assert out.count("6 tokens · ") == 1


def test_ctrl_c_at_one_response_is_status_130(export, monkeypatch):
    from model.chat.session import ChatSession

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "ask", interrupt)
    assert main([str(export), "--device", "cpu", "--prompt", "Why?"]) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "the prompt is not valid UTF-8 text"),
        (["--json"], "--json needs --prompt"),
        (["--prompt", "x", "--mode", "ar", "--threshold", "0.5"], "--threshold has no effect in mode ar"),
        (["--prompt", "x", "--mode", "ar", "--block-length", "4"], "--block-length has no effect in mode ar"),
        (["--prompt", "x", "--mask-groups", "2"], "--mask-groups only affects mode quadratic"),
        (["--top-k", "5"], "--top-k has no effect without --temperature"),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p has no effect without --temperature"),
        (["--prompt", "x", "--seed", "5"], "--seed has no effect without --temperature"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], "0 leaves no token to choose"),
        (["--prompt", "x", "--block-length", "0"], "0 is too small"),
        (["--prompt", "x", "--thinking-budget", "-1"], "-1 is too small"),
        (["--prompt", "x", "--mode", "cubic"], "invalid choice: 'cubic'"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: 0 is too small"),
        (["--prompt", "x", "--block-length", "many"], "invalid count value: 'many'"),
        (["--prompt", "x", "--threshold", "1.5"], "1.5 is not a probability"),
        (["--prompt", "x", "--temperature", "nan"], "nan is not a temperature"),
        (["--prompt", "x", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--prompt", "the sea " * 300, "--device", "cpu"], "the model only 256 positions"),
        (["--prompt", "x", "--system", " "], "--system is empty"),
    ],
)
def test_bad_input_is_one_line_and_status_2(export, arguments, message, capsys):
    assert status_of([str(export), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


def status_of(arguments):
    try:
        return main(arguments)
    except SystemExit as done:  # argparse
        return done.code


def test_a_directory_that_is_no_checkpoint_is_one_line_and_status_2(tmp_path, capsys):
    assert main([str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not an exported checkpoint")


def test_characters_that_steer_a_terminal_do_not_reach_it():
    from rich.console import Console

    from model.chat.terminal import build_writer

    for terminal, expected in ((True, "a\ufffd[2Jb\n\tc"), (False, "a\x1b[2Jb\n\tc")):
        file = io.StringIO()
        build_writer(Console(file=file, force_terminal=terminal))("a\x1b[2Jb\n\tc")
        assert file.getvalue() == expected
