"""python -m lora.evaluate: its files, its table, its exit status; and the same counts by plain PEFT."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, PreTrainedTokenizerFast

from lora.evaluate import __main__ as evaluate
from model.evaluate import command_line, decoder
from model.export.draft_adapter import identify_checkpoint
from tests.helpers.tiny_exports import TEXT, save_drafting_export

ROOT = Path(__file__).parents[3]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_drafting_export(tmp_path_factory.mktemp("evaluate") / "export")


@pytest.fixture
def prompts(tmp_path: Path) -> list[Path]:
    """Write two files of three groups."""
    texts = [{"text": TEXT[i:]} for i in range(4)]
    chats: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"Why {i}?"}]} for i in range(3)]
    files = {"stories": texts, "chats": [*chats, {"prompt": "The sea is ", "group": "a name of many words " * 3}]}
    for name, records in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [tmp_path / f"{name}.jsonl" for name in files]


def run(export: Path, prompts: list[Path], output: Path, *options: str) -> int:
    arguments = [str(export), "--prompts", *map(str, prompts), "--output", str(output), "--device", "cpu"]
    return evaluate.main([*arguments, "--max-new-tokens", str(NEW_TOKENS), "--resamples", "50", *options])


def test_table_and_files(
    export: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(export.rglob("*"))
    assert run(export, prompts, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.png"]
    assert sorted(export.rglob("*")) == before
    picture = (tmp_path / "out" / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", picture[16:24])) > 400
    table = capsys.readouterr().out.partition("numbers and picture")[0]
    assert max(map(len, table.splitlines())) <= 80
    for text in ("stories (4)", "chats (3)", "all (8)", "linear + adapter", "yes", "7.67"):
        assert text in table


def test_plain_peft_on_the_export_counts_the_same(export: Path, prompts: list[Path], tmp_path: Path) -> None:
    """AutoModel with the export's own code and PeftModel.from_pretrained, as any user would."""
    assert run(export, prompts[:1], tmp_path, "--prompt-tokens", "6") == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    base = AutoModel.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    model: Any = PeftModel.from_pretrained(base, str(export), subfolder="linear_spec_lora")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    calls: list[int] = []
    lora_a = base.encoder.layers[0].self_attn.o_proj.lora_A["default"]
    lora_a.register_forward_pre_hook(lambda *_: calls.append(1))
    for record, measured in zip(prompts[0].read_text().splitlines(), report["prompts"], strict=True):
        ids = torch.tensor([tokenizer(json.loads(record)["text"])["input_ids"][:6]])
        calls.clear()
        expected, num_forwards = model.ar_generate(ids, NEW_TOKENS)
        assert not calls
        assert measured["modes"]["ar"]["num_forwards"] == num_forwards
        output, num_forwards = model.linear_spec_generate(ids, NEW_TOKENS)
        assert torch.equal(output, expected)
        assert measured["modes"]["linear+adapter"]["num_forwards"] == num_forwards
        assert 0 < len(calls) <= (num_forwards - 1) / 2
        with model.disable_adapter():
            calls.clear()
            output, num_forwards = model.linear_spec_generate(ids, NEW_TOKENS)
        assert torch.equal(output, expected)
        assert not calls
        assert measured["modes"]["linear"]["num_forwards"] == num_forwards
    assert report["acceptance_length_after"] < report["acceptance_length_before"]
    assert report["interval"][0] <= report["gain_percent"] <= report["interval"][1]
    assert report["equals_greedy_ar"] is True


def test_json_is_all_there_is_on_standard_output(
    export: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export, prompts, tmp_path / "out", "--json", "--limit", "1", "--dtype", "bf16") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert printed["overall"]["num_prompts"] == len(printed["groups"]) == 3
    assert printed["settings"]["dtype"] == "bfloat16"


def test_other_tokens_than_ars_are_status_1_after_the_table(
    export: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    real = decoder.decode

    def differ(model: Any, mode: str, *arguments: Any, **options: Any) -> Any:
        result = real(model, mode, *arguments, **options)
        if mode == "linear":
            result.output_ids[0, -1] = 9
        return result

    monkeypatch.setattr(decoder, "decode", differ)
    assert run(export, prompts, tmp_path / "out", "--limit", "1") == 1
    shown = capsys.readouterr()
    assert "NO: 1" in shown.out
    assert f"6 outputs of self-speculation are not greedy AR's, the first one at {prompts[0]}:1" in shown.err
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["equals_greedy_ar"] is False


def test_an_adapter_trained_for_other_weights_is_refused(
    export: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(export / "linear_spec_lora", tmp_path / "adapter"))
    options = ("--adapter", str(adapter), "--limit", "1")
    (adapter / "drafter.json").write_text(json.dumps({"checkpoint": identify_checkpoint(export)}))
    assert run(export, prompts, tmp_path / "out", *options) == 0
    (adapter / "drafter.json").write_text(json.dumps({"checkpoint": "0123"}))
    assert run(export, prompts, tmp_path / "out", *options) == 2
    assert "was trained for another checkpoint" in capsys.readouterr().err


def test_mistakes_are_one_message_and_status_2(
    export: Path, prompts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Path(shutil.copytree(export, tmp_path / "plain", ignore=shutil.ignore_patterns("linear_spec_lora")))
    (tmp_path / "file").touch()
    cases: tuple[tuple[Any, str], ...] = (
        ((plain, prompts, tmp_path / "out"), f"{plain} has no linear_spec_lora/: train one"),
        ((tmp_path / "nowhere", prompts, tmp_path / "out"), "nowhere is not a directory"),
        ((export, prompts, export / "report"), "is inside the checkpoint: choose a folder outside"),
        ((export, prompts, tmp_path / "file"), "is a file: choose a folder"),
        ((export, [tmp_path / "none.jsonl"], tmp_path / "out"), "none.jsonl is not a file"),
        ((export, prompts, tmp_path / "out", "--max-new-tokens", "256"), "exceeds the model's 256 positions"),
        ((export, prompts, tmp_path / "out", "--device", "cuda:99"), "there is no device 'cuda:99' here"),
        ((export, prompts, tmp_path / "out", "--adapter", str(export)), "not a PEFT adapter"),
    )
    for changed, message in cases:
        assert run(*changed) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(export)])


def test_the_report_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    assert command_line.choose_output(tmp_path / "export", None) == tmp_path.resolve() / "export-evaluation"


def test_help_needs_no_torch() -> None:
    script = (
        "import runpy, sys\nsys.argv = ['evaluate', '--help']\n"
        "try:\n    runpy.run_module('lora.evaluate', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    print(done.code, {'torch', 'transformers', 'hydra', 'peft'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert shown.stdout.endswith("0 set()\n"), shown.stderr
    assert "examples:" in shown.stdout
