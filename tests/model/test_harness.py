"""lm-evaluation-harness runs tasks of its own kinds on an export in every mode."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModel

from conf.errors import UserError
from model.harness import TriModeLM
from model.hf.decoding_nemotron_labs_diffusion import MODES
from tests.helpers.tiny_exports import save_random_adapter, save_tiny_export

WORDS = ("sea", "ships", "sea is wide")
STORY = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["STOP"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Tell me a story about the"
doc_to_choice: ["{{{{answer}}}}", "zzz"]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """An export with an adapter, and two tasks over three rows beside it."""
    folder = tmp_path_factory.mktemp("harness")
    save_tiny_export(folder / "export")
    save_random_adapter(folder / "export" / "linear_spec_lora")
    rows = [{"question": f"Tell me a story about the {word}", "answer": word} for word in WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("story", STORY), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(task.format(rows=folder / "rows.jsonl"))
    return folder


def evaluate(folder, tasks, **options):
    return simple_evaluate(
        model=TriModeLM(str(folder / "export"), device="cpu", **options),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )


def get_answers(results):
    return [sample["resps"][0][0] for sample in results["samples"]["story"]]


def test_speculation_answers_tasks_as_ar_does_in_batches_of_different_prompts(folder):
    answers = {mode: get_answers(evaluate(folder, ["story"], mode=mode, batch_size=2)) for mode in MODES}
    assert answers["linear"] == answers["quadratic"] == answers["ar"]
    assert any(answers["ar"])


def test_results_say_how_answers_were_decoded(folder):
    info = evaluate(folder, ["story"], mode="ar")["config"]
    assert info["mode"] == "ar"
    assert info["tokens_per_forward"] == 1.0
    assert info["new_tokens"] > 0


def test_likelihoods_are_those_of_the_checkpoint_loaded_by_transformers(folder):
    samples = evaluate(folder, ["choice"], mode="quadratic")["samples"]["choice"]
    model = AutoModel.from_pretrained(folder / "export", trust_remote_code=True, dtype=torch.float32)
    tokenizer = TriModeLM(str(folder / "export"), device="cpu").tokenizer
    for sample in samples:
        for arguments, ((likelihood, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            context, whole = (tokenizer(text)["input_ids"] for text in (arguments[0], arguments[0] + arguments[1]))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            rows = range(len(context) - 1, len(whole) - 1)
            expected = sum(logits[row, whole[row + 1]].item() for row in rows)
            assert likelihood == pytest.approx(expected, abs=1e-4)


def test_the_command_line_is_the_harness_own_with_one_more_kind_of_model(folder):
    command = [sys.executable, "-m", "model.harness", "run", "--model", "tri_mode", "--tasks", "story"]
    command += ["--model_args", f"pretrained={folder}/nothing,mode=ar", "--include_path", str(folder)]
    done = subprocess.run(command, cwd=Path.cwd(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {folder}/nothing is not a directory")


def test_an_unknown_mode_and_an_unknown_generation_argument_are_named(folder):
    with pytest.raises(UserError, match="no mode 'fast': choose ar, block_diffusion"):
        TriModeLM(str(folder / "export"), mode="fast")
    model = TriModeLM(str(folder / "export"), device="cpu")
    with pytest.raises(UserError, match="asks for num_beams"):
        model._model_generate(torch.tensor([[5, 6]]), 8, [], num_beams=4)
