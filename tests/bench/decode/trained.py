"""Decodes held-out prompts with a trained model in every setting, and counts forwards, positions and seconds."""

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from model.evaluate.judging import AgreementJudge
from model.evaluate.prompts import read_prompts
from model.export.load import attach_adapter, load_export, load_export_tokenizer
from model.hf.decoding import decode
from model.hf.layers import DraftAdapter
from model.hf.options import DecodeOptions
from tests.bench.decode.settings import Setting, list_settings

PROMPT_TOKENS = 64
ADAPTER = Path("drafters/rank_128/adapter")


@dataclass(frozen=True)
class Task:
    """One prompt to decode. root: folder of the trained model, with export, prompts and perhaps the adapter."""

    root: Path
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Run:
    """One prompt decoded in one setting. num_positions leaves out the prompt's; agreement is with greedy AR."""

    setting: Setting
    num_tokens: int
    num_forwards: int
    num_positions: int
    seconds: float
    acceptance_lengths: list[int]
    agreement: str


def find_adapter(root: Path) -> Path | None:
    """Return the draft adapter of a trained model, if there is one."""
    return root / ADAPTER if (root / ADAPTER).is_dir() else None


def load_model(root: Path) -> Any:
    """Load the export in fp32, and attach its draft adapter if there is one."""
    model = load_export(root / "export", dtype="fp32", device="cpu")
    if adapter := find_adapter(root):
        attach_adapter(model, adapter)
    return model


def decode_prompts(root: Path, *, per_group: int, max_new_tokens: int, num_processes: int) -> list[list[Run]]:
    """Decode every prompt in every setting, with one thread per process."""
    files = sorted((root / "prompts").glob("*.jsonl"))
    prompts = read_prompts(files, load_export_tokenizer(root / "export"), prompt_tokens=PROMPT_TOKENS, limit=per_group)
    tasks = [Task(root, prompt.token_ids, max_new_tokens) for prompt in prompts]
    with ProcessPoolExecutor(num_processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(decode_prompt, tasks))


_models: dict[Path, Any] = {}  # of this process


def decode_prompt(task: Task) -> list[Run]:
    """Decode one prompt in every setting; the first is AR, which the others are compared with."""
    if task.root not in _models:
        _models[task.root] = load_model(task.root)
    model = _models[task.root]
    settings = list_settings(has_adapter=bool(DraftAdapter(model)))
    outcomes = [_decode(model, task, setting) for setting in settings]
    judge, ar = AgreementJudge(model), outcomes[0][0]
    return [
        Run(
            setting,
            len(tokens),
            result.num_forwards,
            result.num_positions - len(task.prompt_ids),
            seconds,
            result.acceptance_lengths,
            judge.compare(task.prompt_ids, ar, tokens).value,
        )
        for setting, (tokens, result, seconds) in zip(settings, outcomes, strict=True)
    ]


def _decode(model: Any, task: Task, setting: Setting) -> tuple[list[int], Any, float]:
    """Return new tokens, result and CPU seconds. No token stops it, so that every prompt counts alike."""
    prompt = torch.tensor([task.prompt_ids])
    options = DecodeOptions(
        task.max_new_tokens,
        block_length=setting.block_length,
        threshold=setting.threshold,
        mask_groups=setting.mask_groups,
        eos_token_id=[],
    )
    with nullcontext() if setting.with_adapter else DraftAdapter(model).suspended():
        begin = time.process_time()
        result = decode(model, setting.mode, prompt, options)
        seconds = time.process_time() - begin
    return result.output_ids[0, prompt.shape[1] :].tolist(), result, seconds


def add_up(runs: Sequence[Run]) -> dict[str, Any]:
    """Compute the figures of one setting over all prompts, as ratios of sums.

    num_forwards counts prefills; num_positions counts no position of a prompt. forwards_per_token and
    positions_per_token leave out the prefill and the token that it yields: they are what decoding costs.
    """
    tokens, forwards, positions = (
        sum(run.num_tokens for run in runs),
        sum(run.num_forwards for run in runs),
        sum(run.num_positions for run in runs),
    )
    lengths = [length for run in runs for length in run.acceptance_lengths]
    agreements = [run.agreement for run in runs]
    later = tokens - len(runs)
    return {
        "num_tokens": tokens,
        "num_forwards": forwards,
        "num_positions": positions,
        "tokens_per_forward": tokens / forwards,
        "tokens_per_position": later / positions,
        "forwards_per_token": (forwards - len(runs)) / later,
        "positions_per_token": positions / later,
        "acceptance_length": sum(lengths) / len(lengths) if lengths else None,
        "tokens_per_second": tokens / sum(run.seconds for run in runs),
        "agreement": {kind: agreements.count(kind) for kind in sorted(set(agreements))},
    }
