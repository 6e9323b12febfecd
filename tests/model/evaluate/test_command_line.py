"""python -m model.evaluate: its files, its tables, its exit status, its messages."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedTokenizerFast

from model.evaluate import __main__ as evaluate
from model.evaluate import decoder
from tests.helpers.tiny_exports import (
    REPEATED_TOKEN,
    TEXT,
    save_drafting_export,
)

ROOT = Path(__file__).parents[3]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_drafting_export(tmp_path_factory.mktemp("evaluate") / "export")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Write two groups; the last two records have answers, one of which the model gives."""
    records: list[dict[str, Any]] = [{"text": TEXT[i:]} for i in range(2)]
    records.append(
        {"messages": [{"role": "user", "content": "Why?"}], "answer": ["never", "said"], "group": "questions"}
    )
    records.append({"prompt": "Why?", "answer": 7, "group": "questions"})
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "stories.jsonl"


def run(export: Path, prompts: Path, output: Path, *options: str) -> int:
    arguments = [str(export), "--prompts", str(prompts), "--output", str(output), "--device", "cpu"]
    return evaluate.main([*arguments, "--max-new-tokens", str(NEW_TOKENS), "--resamples", "20", *options])


def test_tables_and_files(
    export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(export.rglob("*"))
    options = ("--adapter", "--speed-of-light", "--sweep", "0.5,1", "--answer-pattern", "(.)$")
    assert run(export, prompts, tmp_path / "out", *options) == 0
    names = ["acceptance_length.png", "modes.json", "modes.png", "thresholds.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert sorted(export.rglob("*")) == before
    for name in set(names) - {"modes.json"}:
        picture = (tmp_path / "out" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", picture[16:24])) > 300
    tables = capsys.readouterr().out.partition("numbers and pictures")[0]
    assert max(map(len, tables.splitlines())) <= 80
    header, *lines = tables.partition("Thresholds")[2].partition("block_diffusion commits")[0].strip().splitlines()
    assert not [line for line in lines[2:] if line.strip() and len(line.split()) != 8], "no cell folds"
    assert len(header.split()) == 6, "tokens/ tokens/ equals lead- accu- 4-"
    for text in ("Speed", "Forwards", "Text", "by group", "Thresholds", "quadratic+adapter@0.5", "speed of light"):
        assert text in tables
    for text in ("prefill\u00a04, step\u00a092", "0% (0%..66%) of 2", "questions", "100%"):
        assert text in tables
    report = json.loads((tmp_path / "out" / "modes.json").read_text())
    assert report["speed_of_light"]["num_forwards"] == 4 * (1 + 3 + 2)
    assert report["speed_of_light"]["tokens_per_forward"] == NEW_TOKENS / 6
    assert report["equals_greedy_ar"] is True
    assert report["overall"]["modes"]["linear"]["tokens_per_forward"] == NEW_TOKENS / 7
    assert report["settings"]["adapter"] == str(export / "linear_spec_lora")
    assert len(report["variants"]) == 6 + 2 * 5 + 4  # speculation also at 0


def test_the_exports_own_code_counts_the_same(export: Path, prompts: Path, tmp_path: Path) -> None:
    """AutoModel with the export's own code, as any user would."""
    assert run(export, prompts, tmp_path / "out", "--prompt-tokens", "6", "--keep-texts", "--threshold", "0.3") == 0
    report = json.loads((tmp_path / "out" / "modes.json").read_text())
    model: Any = AutoModel.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:6]])
    measured = report["prompts"][0]["modes"]
    for mode, generate, options in (
        ("ar", model.ar_generate, {}),
        ("block_diffusion", model.generate, {"threshold": 0.3}),
        ("linear", model.linear_spec_generate, {"threshold": 0.3}),
        ("quadratic", model.quadratic_spec_generate, {"threshold": 0.3}),
    ):
        output, num_forwards = generate(ids, max_new_tokens=NEW_TOKENS, **options)
        assert measured[mode]["num_forwards"] == num_forwards
        assert measured[mode]["text"] == tokenizer.decode(output[0, 6:], skip_special_tokens=True)


def test_questions_are_scored_in_two_ways(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    choices = ["A", "the sea", "out every day"]
    records = [{"prompt": "Why?", "choices": choices, "answer": text, "group": text} for text in choices]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, [*records, {"prompt": "no question"}])))
    assert run(export, tmp_path / "questions.jsonl", tmp_path / "out", "--modes", "ar", "--batch-size", "2") == 0
    tables = capsys.readouterr().out.partition("numbers and pictures")[0]
    assert max(map(len, tables.splitlines())) <= 80
    table = " ".join(tables.partition("Multiple choice")[2].split())
    assert "AR likelihood 33% (6%..79%) of 3" in table and "masks 33% (6%..79%) of 3" in table
    assert "guessing: 33%" in table
    report = json.loads((tmp_path / "out" / "modes.json").read_text())
    assert ["choices" in prompt for prompt in report["prompts"]] == [True, True, True, False]
    for way in ("ar_likelihood", "masked"):
        assert report["overall"]["choices"][way]["accuracy"]["num_correct"] == 1
        scores = [prompt["choices"][way] for prompt in report["prompts"][:3]]
        best = scores[0]["log_probabilities"].index(max(scores[0]["log_probabilities"]))
        assert [one["chosen"] for one in scores] == [best] * 3
        assert [one["correct"] for one in scores] == [index == best for index in range(3)]
        shares = [report["groups"][text]["choices"][way]["accuracy"]["share"] for text in choices]
        assert shares == [float(index == best) for index in range(3)]
    assert "choices" not in report["groups"]["questions"]
    long = {"prompt": "Why?", "choices": ["A", TEXT], "answer": "A"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long))
    assert run(export, tmp_path / "long.jsonl", tmp_path / "out") == 2
    assert "long.jsonl:1: a choice has" in capsys.readouterr().err


def test_json_is_all_there_is_on_standard_output(
    export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--json", "--batch-size", "2", "--dtype", "bf16", "--modes", "linear,quadratic")
    assert run(export, prompts, tmp_path / "out", *options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "modes.json").read_text())
    assert list(printed["overall"]["modes"]) == ["ar", "linear", "quadratic"]
    assert printed["prompts"][0]["batch_size"] == 2
    assert printed["settings"]["dtype"] == "bfloat16"
    assert printed["speed_of_light"] is None


def test_sampling_has_no_agreement_and_repeats_with_its_seed(
    export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name in ("first", "second"):
        options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "3", "--keep-texts")
        assert run(export, prompts, tmp_path / name, *options, "--modes", "ar,linear") == 0
        report = json.loads((tmp_path / name / "modes.json").read_text())
        texts.append([row["modes"]["linear"]["text"] for row in report["prompts"]])
        assert report["equals_greedy_ar"] is None
        assert report["overall"]["modes"]["linear"]["agreement"] is None
    assert texts[0] == texts[1]
    assert "temperature 1.5" in capsys.readouterr().out


def test_a_thinking_budget_and_fewer_groups_of_masks_leave_the_modes_equal(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model never ends its thinking by itself."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    (tmp_path / "thinking.jsonl").write_text('{"prompt": "<think>The sea"}')
    options = ("--thinking-budget", "5", "--mask-groups", "2", "--keep-texts", "--adapter")
    assert run(export, tmp_path / "thinking.jsonl", tmp_path / "out", *options) == 0
    (row,) = json.loads((tmp_path / "out" / "modes.json").read_text())["prompts"]
    repeated = str(tokenizer.decode([REPEATED_TOKEN]))
    texts = {mode: values["text"] for mode, values in row["modes"].items() if mode != "block_diffusion"}
    assert set(texts.values()) == {texts["ar"]}
    assert texts["ar"].replace("</think>", "") == repeated * (NEW_TOKENS - 1)
    capsys.readouterr()


def test_pictures_of_an_earlier_run_do_not_stay(export: Path, prompts: Path, tmp_path: Path) -> None:
    assert run(export, prompts, tmp_path / "out", "--sweep", "1", "--modes", "linear", "--limit", "1") == 0
    assert (tmp_path / "out" / "thresholds.png").exists()
    assert run(export, prompts, tmp_path / "out", "--modes", "ar", "--limit", "1") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["modes.json", "modes.png"]


def test_other_tokens_than_ars_are_status_1_after_the_tables(
    export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    real = decoder.decode

    def differ(model: Any, mode: str, *arguments: Any, **options: Any) -> Any:
        result = real(model, mode, *arguments, **options)
        if mode == "quadratic":
            result.output_ids[0, -1] = REPEATED_TOKEN + 1
        return result

    monkeypatch.setattr(decoder, "decode", differ)
    assert run(export, prompts, tmp_path / "out", "--limit", "1") == 1
    shown = capsys.readouterr()
    assert "NO: 2" in shown.out
    assert f"2 outputs of self-speculation are not greedy AR's, the first one at {prompts}:1" in shown.err
    assert json.loads((tmp_path / "out" / "modes.json").read_text())["equals_greedy_ar"] is False


def test_mistakes_are_one_message_and_status_2(
    export: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path(shutil.copytree(export, tmp_path / "plain", ignore=shutil.ignore_patterns("linear_spec_lora")))
    (tmp_path / "masked.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "a <SPECIAL_100>"}')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine", "answer": []}')
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    cases: tuple[tuple[Any, str], ...] = (
        ((plain, prompts, out, "--adapter"), f"{plain} has no linear_spec_lora/: train one"),
        ((tmp_path / "nowhere", prompts, out), "nowhere is not a directory"),
        ((export, prompts, export / "report"), "is inside the checkpoint: choose a folder outside"),
        ((export, prompts, tmp_path / "file"), "is a file: choose a folder"),
        ((export, tmp_path / "none.jsonl", out), "none.jsonl is not a file"),
        ((export, tmp_path / "bad.jsonl", out), 'bad.jsonl:1: "answer" must be text'),
        ((export, prompts, out, "--max-new-tokens", "256"), "exceeds the model's 256 positions"),
        ((export, prompts, out, "--block-length", "512"), "block_length is 512"),
        ((export, prompts, out, "--top-p", "0.5"), "--top-p has no effect without --temperature"),
        ((export, prompts, out, "--seed", "1"), "--seed has no effect without --temperature"),
        ((export, prompts, out, "--speed-of-light", "--temperature", "1"), "follows greedy AR's text"),
        ((export, prompts, out, "--speed-of-light", "--thinking-budget", "4"), "cannot follow a --thinking-budget"),
        ((export, prompts, out, "--modes", "linear", "--mask-groups", "2"), "--mask-groups only affects mode quad"),
        ((export, prompts, out, "--modes", "linear", "--verifier-weight", "0.5"), "only affects mode quadratic: add"),
        ((export, prompts, out, "--verifier-weight", "0.5,1"), "--verifier-weight 1 is AR alone"),
        ((export, prompts, out, "--verifier-weight", "0.5", "--mask-groups", "2"), "needs all groups of masks"),
        ((export, prompts, out, "--modes", "ar", "--adapter"), "--adapter only drafts for linear and quadratic"),
        ((export, prompts, out, "--modes", "ar", "--sweep"), "--sweep has no effect in mode ar"),
        ((export, prompts, out, "--modes", "ar", "--block-length", "4"), "--block-length has no effect in mode ar"),
        ((export, tmp_path / "masked.jsonl", out), "masked.jsonl:2: the prompt contains the mask token"),
        ((export, prompts, out, "--adapter", str(export)), "not a PEFT adapter"),
    )
    for changed, message in cases:
        assert run(*changed) == 2, message
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--modes", "ar,fast"), "there is no mode 'fast': choose from ar, block_diffusion, linear, quadratic"),
        (("--block-length", "0"), "0 is too small"),
        (("--max-new-tokens", "0"), "0 is too small"),
        (("--threshold", "1.5"), "1.5 is not a probability"),
        (("--sweep", "0.5,x"), "must be probabilities separated by commas"),
        (("--top-p", "0"), "0 leaves no token to choose"),
        (("--temperature", "-1"), "-1 is not a temperature"),
        (("--thinking-budget", "-1"), "-1 is too small"),
        (("--answer-pattern", "("), "'(' is not a regular expression"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["nowhere", "--prompts", "none.jsonl", *options])
    assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    script = (
        "import runpy, sys\nsys.argv = ['evaluate', '--help']\n"
        "try:\n    runpy.run_module('model.evaluate', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    print(done.code, {'torch', 'transformers', 'hydra', 'peft', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.stdout.endswith("0 set()\n"), shown.stderr
    assert "examples:" in shown.stdout
