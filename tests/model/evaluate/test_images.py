"""Records with images are decoded, compared and scored in every mode, as the model's own entry points do it."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.evaluate.__main__ import main
from model.evaluate.evaluation import Evaluation, evaluate_modes
from model.evaluate.judging import Agreement
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt, read_prompts
from model.evaluate.variants import Variant
from model.export.images import load_image_reader, load_pixels
from model.export.load import attach_adapter, load_export, load_export_tokenizer
from model.hf.layers import DraftAdapter
from model.hf.options import MODES
from tests.helpers.tiny_exports import save_random_adapter, save_tiny_export
from tests.helpers.tiny_vlm import draw_picture, save_vlm_export

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an export with images and a draft adapter, pictures, and records of all kinds."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_vlm_export(folder / "vlm")
    # The text model of both has the same dimensions, so one's adapter fits the other.
    save_random_adapter(folder / "vlm" / "linear_spec_lora")
    data = base64.b64encode(draw_picture(folder / "a.png", 50, 91).read_bytes()).decode()
    draw_picture(folder / "b.png", 80, 30, seed=1)
    question = [{"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "Why?"}]
    inline = [{"type": "text", "text": "the sea"}, {"type": "image_url", "image_url": {"url": f"data:x;base64,{data}"}}]
    asked = {"prompt": "the sea is", "group": "two", "choices": [" wide", " blue and"], "answer": " wide"}
    records = [
        {"messages": [{"role": "user", "content": question}], "group": "one", "answer": "Because."},
        {"messages": [{"role": "user", "content": inline}], "group": "one"},
        {"images": ["a.png", "b.png"], "texts": [{"user": "the ships", "assistant": "go out."}], "group": "two"},
        {**asked, "images": ["a.png"]},
        {**asked, "images": ["b.png"]},
        {"prompt": "every day", "group": "two"},
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def prompts(saved: Path) -> list[EvaluationPrompt]:
    tokenizer = load_export_tokenizer(saved / "vlm")
    read_image = load_image_reader(saved / "vlm", tokenizer)
    return read_prompts([saved / "records.jsonl"], tokenizer, prompt_tokens=5, read_image=read_image)


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    model: Any = load_export(saved / "vlm", device="cpu").double()
    attach_adapter(model, saved / "vlm" / "linear_spec_lora")
    return model


@pytest.fixture(scope="module")
def evaluation(saved: Path, model: Any, prompts: list[EvaluationPrompt]) -> Evaluation:
    options = EvaluationOptions(max_new_tokens=NEW_TOKENS, batch_size=2, speed_of_light=True, resamples=10)
    variants = [*(Variant(mode) for mode in MODES), Variant("linear", with_adapter=True)]
    return evaluate_modes(model, prompts, variants, options, tokenizer=load_export_tokenizer(saved / "vlm"))


def test_every_mode_writes_what_the_models_entry_points_write(model: Any, evaluation: Evaluation) -> None:
    for batch in evaluation.batches:
        for name, decoded in batch.decoded.items():
            if evaluation.variants[name].with_adapter:
                continue
            mode = evaluation.variants[name].mode
            for prompt, tokens in zip(batch.prompts, decoded.tokens, strict=True):
                ids = torch.tensor([prompt.token_ids])
                options = {"threshold": 0.9} if mode == "block_diffusion" else {}
                pixels = load_pixels(prompt.images)
                output, _ = model.generate(ids, mode=mode, max_new_tokens=NEW_TOKENS, **options, **pixels)
                assert output[0, ids.shape[1] :].tolist() == tokens, (name, prompt.place)


def test_speculation_writes_greedy_ar_and_images_matter(evaluation: Evaluation) -> None:
    for batch in evaluation.batches:
        for name in ("linear", "quadratic", "linear+adapter"):
            assert batch.agreements[name] == [Agreement.equal] * len(batch.prompts)
    asked = {
        prompt.place: batch.decoded["ar"].tokens[i]
        for batch in evaluation.batches
        for i, prompt in enumerate(batch.prompts)
    }
    fourth, fifth = (tokens for place, tokens in asked.items() if place.endswith((":4", ":5")))
    assert fourth != fifth, "these prompts differ in their images alone"


def test_ceilings_and_choices_read_the_images(
    model: Any, prompts: list[EvaluationPrompt], evaluation: Evaluation
) -> None:
    assert evaluation.ceilings.keys() == {prompt.place for prompt in prompts}
    fourth, fifth = (evaluation.choices[prompt.place] for prompt in prompts[3:5])
    for way in ("ar_likelihood", "masked"):
        assert fourth[way].log_probabilities != pytest.approx(fifth[way].log_probabilities, abs=1e-3)
    prompt, choices = prompts[3], prompts[3].choices
    assert choices is not None
    for ids, found in zip(choices.token_ids, fourth["ar_likelihood"].log_probabilities, strict=True):
        tokens = torch.tensor([[*prompt.token_ids, *ids]])
        with torch.no_grad(), DraftAdapter(model).suspended():
            logits = model(tokens, **load_pixels(prompt.images)).logits[0]
        logits[:, model.config.mask_token_id] = -torch.inf
        table = logits.log_softmax(-1)[len(prompt.token_ids) - 1 : -1]
        expected = sum(float(table[i, token]) for i, token in enumerate(ids))
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_command_line_evaluates_records_with_images(saved: Path, tmp_path: Path, capsys: Any) -> None:
    command = [str(saved / "vlm"), "--prompts", str(saved / "records.jsonl"), "--output", str(tmp_path / "report")]
    assert main([*command, "--max-new-tokens", "4", "--modes", "linear", "--device", "cpu", "--resamples", "10"]) == 0
    assert (tmp_path / "report" / "modes.json").is_file()
    save_tiny_export(tmp_path / "text")
    assert main([str(tmp_path / "text"), *command[1:], "--device", "cpu"]) == 2
    assert "has images, but the checkpoint reads text alone" in capsys.readouterr().err.replace("\n", " ")
