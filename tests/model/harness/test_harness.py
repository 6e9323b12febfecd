"""lm-evaluation-harness runs tasks of its own kinds on an export in every mode."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from transformers import AutoModel

from conf.system.errors import UserError
from model.export.load import find_stop_ids
from model.harness.__main__ import TriModeLM, _read_sampling
from model.harness.stop_strings import StopStrings
from model.hf.decoding import decode
from model.hf.options import MODES, DecodeOptions
from tests.helpers.tiny_exports import save_random_adapter, save_tiny_export

WORDS = ("sea", "ships", "sea is wide")
STORY = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
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
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Tell me a story about the"
doc_to_choice: ["{{{{answer}}}}", "zzz"]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Write an export with an adapter, and two tasks over three records next to it."""
    folder = tmp_path_factory.mktemp("harness")
    save_tiny_export(folder / "export")
    save_random_adapter(folder / "export" / "linear_spec_lora")
    records = [{"question": f"Tell me a story about the {word}", "answer": word} for word in WORDS]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, task in (("story", STORY), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(task.format(records=folder / "records.jsonl"))
    return folder


def make_model(folder, **options):
    return TriModeLM(str(folder / "export"), device="cpu", **options)


def evaluate(folder, tasks, **options):
    run: Any = evaluator.simple_evaluate
    return run(
        model=make_model(folder, **options),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )


def get_responses(results):
    return [sample["resps"][0][0] for sample in results["samples"]["story"]]


def test_speculation_does_tasks_as_ar_does_in_batches_of_different_prompts(folder):
    responses = {mode: get_responses(evaluate(folder, ["story"], mode=mode, batch_size=2)) for mode in MODES}
    assert responses["linear"] == responses["quadratic"] == responses["ar"]
    assert any(responses["ar"])


def test_results_say_how_responses_were_decoded(folder):
    info = evaluate(folder, ["story"], mode="ar")["config"]
    assert info["mode"] == "ar"
    assert info["tokens_per_forward"] == 1.0
    assert info["new_tokens"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_a_decode_of_one_prompt_and_nothing_after_it_is_counted(folder, mode):
    context = torch.tensor([[5, 120, 130, 140]])
    model = make_model(folder, mode=mode)
    free = model._model_generate(context, 4 + 24, [])[0, 4:].tolist()
    whole = decode(
        model.model, mode, context, DecodeOptions(max_new_tokens=24, eos_token_id=find_stop_ids(model.model))
    )
    assert free == whole.output_ids[0, 4:].tolist()
    assert model.get_model_info()["tokens_per_forward"] == whole.tokens_per_forward
    stop = model.tok_decode(free[6:9])
    end = next(count for count in range(1, 25) if stop in model.tok_decode(free[:count]))
    again = make_model(folder, mode=mode)
    assert again._model_generate(context, 4 + 24, ["", stop])[0, 4:].tolist() == free[:end]
    info = again.get_model_info()
    assert (info["new_tokens"], info["tokens_after_stop_strings"]) == (end, 0)
    assert end < 16
    forwards = end / info["tokens_per_forward"]
    assert forwards == end if mode == "ar" else forwards < whole.num_forwards


def test_responses_of_a_batch_run_on_and_then_no_rate_is_given(folder):
    context = torch.tensor([[5, 120, 130, 140], [7, 8, 9, 10]])
    free = make_model(folder)
    whole = free._model_generate(context, 4 + 24, [])[:, 4:].tolist()
    assert free.get_model_info()["tokens_per_forward"] == 1.0
    model = make_model(folder)
    stop = model.tok_decode(whole[0][6:9])
    assert model._model_generate(context, 4 + 24, [stop])[:, 4:].tolist() == whole
    info = model.get_model_info()
    assert info["tokens_after_stop_strings"] >= 8
    assert info["new_tokens"] + info["tokens_after_stop_strings"] == free.get_model_info()["new_tokens"]
    assert info["tokens_per_forward"] is None


def test_a_stop_string_does_not_end_a_thought():
    spell: Any = "".join
    letters: Any = list
    end: Any = ">"
    assert StopStrings(spell, ["bc", ""]).find_end(letters("abcabc")) == 3
    assert StopStrings(spell, ["bc"]).find_end(letters("aabc"), 3) == 4
    assert StopStrings(spell, []).find_end(letters("abc")) is None
    assert StopStrings(spell, ["bc"], end).find_end(letters("abc>abc>b")) == 7
    assert StopStrings(spell, ["bc"], end).find_end(letters("abcb>c")) is None


def test_repeats_of_a_sampled_prompt_differ_and_a_run_repeats_with_its_seed(folder):
    context = torch.tensor([[5, 120, 130, 140]])

    def run(seed):
        model = make_model(folder, mode="linear", seed=seed)
        return [model._model_generate(context, 20, [], do_sample=True, temperature=1.5).tolist() for _ in range(3)]

    first = run(3)
    assert first[0] != first[1] != first[2] != first[0]
    assert run(3) == first
    assert run(4)[:2] == first[1:]


def test_sampling_is_read_as_the_harness_means_it():
    assert _read_sampling({"do_sample": False, "temperature": 0.7, "top_k": 5}) == {}
    assert _read_sampling({"temperature": 0.7}) == {"temperature": 0.7}
    assert _read_sampling({"do_sample": True, "top_p": 0.9}) == {"temperature": 1.0, "top_p": 0.9}
    for off in (0, -1):
        assert _read_sampling({"do_sample": True, "top_k": off}) == {"temperature": 1.0}


def test_a_thinking_budget_is_of_the_tokenizers_own_think_tokens(folder):
    model = make_model(folder, thinking_budget=3)
    begin, end = (model.tokenizer.get_vocab()[token] for token in ("<think>", "</think>"))
    response = model._model_generate(torch.tensor([[5, begin]]), 12, [])[0, 2:].tolist()
    assert response.index(end) == 3


def test_what_no_decode_could_be_is_a_message_when_the_model_is_made_or_asked(folder):
    for options, message in (
        ({"block_length": 0}, "block_length is 0"),
        ({"threshold": 7.0}, "threshold is 7"),
        ({"thinking_budget": -1}, "thinking_budget is -1"),
    ):
        with pytest.raises(UserError, match=message):
            make_model(folder, **options)
    model = make_model(folder)
    mask = model.model.config.mask_token_id
    for prompt, arguments, message in (
        ([5, 6], {"do_sample": True, "top_p": 0.0}, "top_p is 0"),
        ([5, mask], {}, "holds the mask token"),
    ):
        with pytest.raises(UserError, match=message):
            model._model_generate(torch.tensor([prompt]), 8, [], **arguments)


def test_likelihoods_are_those_of_the_checkpoint_loaded_by_transformers(folder):
    samples = evaluate(folder, ["choice"], mode="quadratic")["samples"]["choice"]
    model = AutoModel.from_pretrained(folder / "export", trust_remote_code=True, dtype=torch.float32)
    tokenizer = TriModeLM(str(folder / "export"), device="cpu").tokenizer
    for sample in samples:
        for arguments, ((likelihood, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            context, whole = (tokenizer(text)["input_ids"] for text in (arguments[0], arguments[0] + arguments[1]))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            positions = range(len(context) - 1, len(whole) - 1)
            expected = sum(logits[i, whole[i + 1]].item() for i in positions)
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
