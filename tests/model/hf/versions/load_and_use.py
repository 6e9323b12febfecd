"""Use an export as its users do, in whatever transformers is installed: `load_and_use.py EXPORT OUT.json [USE ...]`.

Needs torch, transformers and peft alone, nothing of this repository. Every entry of USES must work; what they return is
written to OUT.json, to be compared between versions. Plain loading may print no warning.
"""

import copy
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments

TEXTS = ["def add(first, second):", "return", "first + second\n    return first"]
ADAPTER = "linear_spec_lora"
MODES = ("ar", "block_diffusion", "linear", "quadratic")
PLAIN = {"trust_remote_code": True, "local_files_only": True}


class Warnings(logging.Handler):
    """Keeps what transformers logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def load(name: str, **options: Any) -> Any:
    return AutoModel.from_pretrained(name, dtype=torch.float32, **PLAIN, **options)


def encode(name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(name, **PLAIN)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


def decode(model: Any, inputs: Any, mode: str, **options: Any) -> list[list[int]]:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**given, mode=mode, max_new_tokens=24, **options)[0].tolist()


def decode_all(name: str) -> dict[str, list[list[int]]]:
    """Decode left-padded prompts greedily in every mode."""
    model, inputs = load(name), encode(name)
    return {mode: decode(model, inputs, mode) for mode in MODES}


def draft_by_peft(name: str) -> Any:
    """Attach the export's draft adapter with PEFT and decode."""
    return describe_drafting(peft.PeftModel.from_pretrained(load(name), str(Path(name) / ADAPTER)), encode(name))


def draft_by_transformers(name: str) -> Any:
    """Attach it with transformers' own load_adapter; say what refuses it."""
    model = load(name)
    try:
        model.load_adapter(str(Path(name) / ADAPTER))
    except ValueError as error:
        return str(error)
    return describe_drafting(model, encode(name))


def describe_drafting(model: Any, inputs: Any) -> dict[str, Any]:
    """Decode with an adapter, and add up its weights: tokens alone would not tell whether it was loaded."""
    weights = sorted(name for name, _ in model.named_parameters() if "lora_" in name)
    total = sum(float(model.get_parameter(name).detach().double().abs().sum()) for name in weights)
    return {"weights": [len(weights), round(total, 3)]} | {mode: decode(model, inputs, mode) for mode in MODES[2:]}


def read_names(name: str) -> dict[str, Any]:
    """Read what configuration and tokenizer say."""
    config, tokenizer = AutoConfig.from_pretrained(name, **PLAIN), AutoTokenizer.from_pretrained(name, **PLAIN)
    return {
        "rope": config.rope_parameters,
        "block_size": config.block_size,
        "ids": tokenizer(TEXTS)["input_ids"],
        "special": sorted(tokenizer.all_special_tokens),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False),
    }


def save_again(name: str, folder: Path) -> dict[str, Any]:
    """Save the model and load the copy, whose code must have come along."""
    model = load(name)
    model.save_pretrained(folder / "saved")
    AutoTokenizer.from_pretrained(name, **PLAIN).save_pretrained(folder / "saved")
    inputs = encode(name)
    return {"tokens": decode(load(str(folder / "saved")), inputs, "linear"), "ids": inputs["input_ids"].tolist()}


def compute_loss(model: Any, inputs: Any) -> Any:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model(**given, labels=inputs["input_ids"]).loss


def train(name: str, folder: Path) -> float:
    """Take three steps of Trainer with gradient checkpointing."""
    model, ids = load(name), encode(name)["input_ids"]
    data: Any = [{"input_ids": line, "labels": line} for line in ids.repeat(2, 1)]
    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    return round(Trainer(model=model, args=options, train_dataset=data).train().training_loss, 3)


def tune(name: str, folder: Path) -> list[list[int]]:
    """Train a LoRA on q and v, save it, load it onto the export, merge it."""
    inputs = encode(name)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(name), lora)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], 1e-2)
    for _ in range(3):
        compute_loss(adapted, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(str(folder / "tuned"))
    expected = decode(adapted, inputs, "ar")
    again: Any = peft.PeftModel.from_pretrained(load(name), str(folder / "tuned"))
    assert decode(again, inputs, "ar") == expected
    assert decode(again.merge_and_unload(), inputs, "linear") == expected
    return expected


def resize(name: str) -> list[list[int]]:
    model = load(name)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert model(torch.ones(1, 4, dtype=torch.long)).logits.shape[-1] == model.config.vocab_size
    return decode(model, encode(name), "linear")


def transform(change: Callable[[Any], Any]) -> Callable[[str], list[list[int]]]:
    return lambda name: decode(change(load(name)), encode(name), "linear")


def compile_forward(name: str) -> float:
    model, inputs = load(name), encode(name)
    expected = compute_loss(model, inputs)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compute_loss(compiled, inputs), expected, atol=1e-5)
    return round(float(expected), 3)


def quantise(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


USES: dict[str, Callable[..., Any]] = {
    "config and tokenizer": read_names,
    "decoding in all modes": decode_all,
    "draft adapter by PEFT": draft_by_peft,
    "draft adapter by load_adapter": draft_by_transformers,
    "save_pretrained": lambda name: save_again(name, Path(tempfile.mkdtemp())),
    "Trainer, gradient checkpointing": lambda name: train(name, Path(tempfile.mkdtemp())),
    "PEFT on q and v": lambda name: tune(name, Path(tempfile.mkdtemp())),
    "resized embeddings": resize,
    "torch.compile": compile_forward,
    "deepcopy": transform(copy.deepcopy),
    "device_map": lambda name: decode(load(name, device_map="auto"), encode(name), "linear"),
    "int8": lambda name: len(decode(quantise(load(name)), encode(name), "linear")),
}


def main() -> None:
    name, out, *chosen = sys.argv[1:]
    warnings = Warnings()
    transformers.utils.logging.get_logger().addHandler(warnings)
    read_names(name)
    load(name)
    results: dict[str, Any] = {"version": transformers.__version__, "warnings": list(warnings.messages)}
    has_adapter = (Path(name) / ADAPTER).is_dir()
    for use in chosen or [use for use in USES if has_adapter or "adapter" not in use]:
        print(use, flush=True)
        results[use] = USES[use](name)
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
