"""Tasks with images run in every mode, and their responses are those of the model's own entry points."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from conf.system.errors import UserError
from model.export.images import load_image_reader, load_pixels
from model.export.load import load_export, load_export_tokenizer
from model.harness.__main__ import TriModeLM
from model.hf.image_tokens import expand_image_tokens
from model.hf.options import MODES
from tests.helpers.tiny_exports import save_random_adapter, save_tiny_export
from tests.helpers.tiny_vlm import draw_picture, save_vlm_export

COLOURS = ("red", "blue", "red")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/records.jsonl}}}}
test_split: test
doc_to_image: !function pictures.open_picture
doc_to_text: "{{{{question}}}}"
"""
SEE = (
    TASK
    + """output_type: generate_until
doc_to_target: "{{{{colour}}}}"
generation_kwargs: {{until: ["STOP"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
)
CHOOSE = (
    TASK
    + """output_type: multiple_choice
doc_to_choice: ["red", "blue"]
doc_to_target: "{{{{0 if colour == 'red' else 1}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
)
PICTURES = """
from PIL import Image


def open_picture(doc):
    return [Image.open(doc["picture"])]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an export with images and an adapter, and two tasks over three records with pictures of any size."""
    folder = tmp_path_factory.mktemp("harness")
    save_vlm_export(folder / "vlm")
    save_random_adapter(folder / "vlm" / "linear_spec_lora")
    records = []
    for number, colour in enumerate(COLOURS):
        picture = draw_picture(folder / f"{number}.png", 40 + 40 * number, 60, seed=number)
        question = "Tell me a story <image> about the sea" if number else "<image>Tell me a story about the sea"
        records.append({"question": question, "picture": str(picture), "colour": colour})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "pictures.py").write_text(PICTURES)
    for name, task in (("see", SEE), ("choose", CHOOSE)):
        (folder / f"{name}.yaml").write_text(task.format(name=name, folder=folder))
    return folder


def evaluate(folder: Path, tasks: list[str], export: str = "vlm", **options: Any) -> dict[str, Any]:
    run: Any = evaluator.simple_evaluate
    return run(
        model=TriModeLM(str(folder / export), device="cpu", **options),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


def read_prompt(folder: Path, number: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the tokens and pixels of a record's prompt."""
    record = json.loads((folder / "records.jsonl").read_text().splitlines()[number])
    tokenizer = load_export_tokenizer(folder / "vlm")
    read_image = load_image_reader(folder / "vlm", tokenizer)
    assert read_image is not None
    image = read_image(record["picture"])
    ids: Any = tokenizer(record["question"].replace("<image>", "<|image_start|>"))["input_ids"]
    return expand_image_tokens(ids, [image.grid]), load_pixels([image])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_task_with_images_runs_in_every_mode(folder: Path, batch_size: int) -> None:
    responses = {}
    for mode in MODES:
        samples = evaluate(folder, ["see"], mode=mode, batch_size=batch_size)["samples"]["see"]
        responses[mode] = [sample["resps"][0][0] for sample in samples]
    assert responses["linear"] == responses["quadratic"] == responses["ar"]
    model: Any = load_export(folder / "vlm", device="cpu")
    tokenizer = load_export_tokenizer(folder / "vlm")
    for mode in ("ar", "block_diffusion"):
        for number, response in enumerate(responses[mode]):
            ids, pixels = read_prompt(folder, number)
            options = {"threshold": 0.9} if mode == "block_diffusion" else {}
            output, _ = model.generate(torch.tensor([ids]), mode=mode, max_new_tokens=12, **options, **pixels)
            assert response == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), (mode, number)


def test_choices_are_scored_by_ar_with_the_images(folder: Path) -> None:
    samples = evaluate(folder, ["choose"], mode="linear")["samples"]["choose"]
    model: Any = load_export(folder / "vlm", device="cpu")
    tokenizer = load_export_tokenizer(folder / "vlm")
    for number, sample in enumerate(samples):
        ids, pixels = read_prompt(folder, number)
        for choice, (((found, is_greedy),),) in zip((" red", " blue"), ((r,) for r in sample["resps"]), strict=True):
            after: Any = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *after]]), **pixels).logits[0, len(ids) - 1 : -1]
            expected = sum(float(row[token]) for row, token in zip(logits.log_softmax(-1), after, strict=True))
            assert float(found) == pytest.approx(expected, abs=1e-4)
            assert str(is_greedy) == str(logits.argmax(-1).tolist() == after)


def test_what_does_not_fit_is_one_clear_error(folder: Path) -> None:
    save_tiny_export(folder / "text")
    with pytest.raises(UserError, match="the task shows images, but the checkpoint reads text alone"):
        evaluate(folder, ["see"], export="text")
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    changed = [line | {"question": "the sea"} for line in lines]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    with pytest.raises(UserError, match="a prompt of the task has 0 times <image> and 1 images"):
        evaluate(folder, ["see"])
