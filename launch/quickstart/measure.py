"""Decode held-out text in every mode with an export known only by its directory, and count tokens and forwards."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

from conf.system.errors import UserError
from data_pipeline.dataset import TokenDataset
from data_pipeline.packing.form import SequenceForm
from model.evaluate.statistics import compute_distinct_share
from model.evaluate.variants import LINEAR_ADAPTER
from model.export.draft_adapter import ADAPTER_FOLDER, check_adapter
from model.hf.options import AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC

NUM_PROMPTS = 8
PROMPT_TOKENS = 96
NEW_TOKENS = 128
NUM_CONTEXTS = 800
CONTEXTS_PER_CALL = 50
# A draft and its verification; quadratic speculation does both in one forward.
FORWARDS_PER_CYCLE = {LINEAR: 2, LINEAR_ADAPTER: 2, QUADRATIC: 1}
# Where an export has real_context_acceptance; older exports have it under the second name.
SPECULATION_MODULES = ("speculation", "speculation_nemotron_labs_diffusion")

Generate = Callable[..., tuple[Tensor, int]]


@dataclass
class ModeMeasurement:
    """Holds the numbers of one mode on all prompts, greedy, in fp32.

    new_tokens, num_forwards: totals. tokens_per_forward, tokens_per_second: their ratios.
    acceptance_length: mean tokens per draft-verify cycle on the continuations; None for modes that do not draft.
    real_context_acceptance: the same for one cycle of linear speculation from each of many true prefixes, else None.
    equals_greedy_ar: every continuation is greedy AR's. distinct_4grams: mean share of different 4-grams.
    """

    new_tokens: int
    num_forwards: int
    tokens_per_forward: float
    acceptance_length: float | None
    real_context_acceptance: float | None
    tokens_per_second: float
    equals_greedy_ar: bool
    distinct_4grams: float


@dataclass
class Continuations:
    """Holds greedy continuations [num_prompts][new tokens], the forwards of each, and the seconds of all."""

    tokens: list[list[int]]
    num_forwards: list[int]
    seconds: float


def run_decoding(export: Path, heldout: Path) -> dict[str, Any]:
    """Decode and measure.

    Returns:
        {"modes": {mode: ModeMeasurement}, "sample": text, settings...}.

    Raises:
        UserError: There is no export, no draft adapter in it, or too little held-out text.
    """
    model = load_shipped_model(export)
    check_adapter(export / ADAPTER_FOLDER, model.config)
    prefixes = choose_prefixes(heldout, NUM_CONTEXTS)
    prompts = prefixes[:: NUM_CONTEXTS // NUM_PROMPTS][:NUM_PROMPTS]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        runs, acceptances = decode_all_modes(model, export, prompts, prefixes, progress)
    return {
        "dtype": "float32",
        "num_prompts": NUM_PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "num_contexts": NUM_CONTEXTS,
        "block_length": model.config.block_size,
        "modes": {mode: asdict(measure_mode(mode, run, runs[AR], acceptances.get(mode))) for mode, run in runs.items()},
        "sample": decode_sample(export, prompts[0], runs[LINEAR].tokens[0]),
    }


def decode_all_modes(
    model: Any, export: Path, prompts: Tensor, prefixes: Tensor, progress: Progress
) -> tuple[dict[str, Continuations], dict[str, float]]:
    """Return the continuations of the prompts by mode, and the real-context acceptance of linear speculation.

    The adapter is attached for the last mode only: a model without one decodes in the others.
    """

    def decode(mode: str, generate: Generate) -> None:
        runs[mode] = decode_prompts(generate, progress.track(prompts, description=mode))

    def draft(mode: str) -> None:
        groups = progress.track(prefixes.split(CONTEXTS_PER_CALL), description=f"real contexts, {mode}")
        acceptances[mode] = measure_real_context_acceptance(model, groups)

    runs: dict[str, Continuations] = {}
    acceptances: dict[str, float] = {}
    decode(AR, model.ar_generate)
    decode(BLOCK_DIFFUSION, model.generate)
    decode(LINEAR, model.linear_spec_generate)
    draft(LINEAR)
    decode(QUADRATIC, model.quadratic_spec_generate)
    model.load_adapter(str(export / ADAPTER_FOLDER))
    decode(LINEAR_ADAPTER, model.linear_spec_generate)
    draft(LINEAR_ADAPTER)
    return runs, acceptances


def load_shipped_model(export: Path) -> Any:
    """Load the exported model in fp32 from nothing but its directory.

    Raises:
        UserError: The directory is not an export.
    """
    if not (export / "config.json").is_file():
        raise UserError(f"{export} has no config.json: export the joint run first (python -m model.convert).")
    model = AutoModel.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


def choose_prefixes(heldout: Path, count: int) -> Tensor:
    """Return true prefixes [count, PROMPT_TOKENS] spread evenly over the held-out text.

    Raises:
        UserError: The text is too short.
    """
    form = SequenceForm(PROMPT_TOKENS, block_size=1, alignment=1, isolate_documents=False)
    dataset = TokenDataset(heldout, form, seed=0, shuffle=False)
    available = dataset.num_sequences - 1  # the last one may be padded
    if available < count:
        raise UserError(f"{heldout} holds {available} prefixes of {PROMPT_TOKENS} tokens, {count} are needed.")
    return torch.cat([dataset.build_sequence(i * available // count).tokens for i in range(count)])


def decode_prompts(generate: Generate, prompts: Iterable[Tensor]) -> Continuations:
    """Continue every prompt [PROMPT_TOKENS] greedily by up to NEW_TOKENS tokens."""
    tokens, forwards, seconds = [], [], 0.0
    for prompt in prompts:
        started = time.perf_counter()
        output, num_forwards = generate(prompt[None], max_new_tokens=NEW_TOKENS, temperature=0.0)
        seconds += time.perf_counter() - started
        tokens.append(output[0, len(prompt) :].tolist())
        forwards.append(num_forwards)
    return Continuations(tokens, forwards, seconds)


def measure_real_context_acceptance(model: Any, contexts: Iterable[Tensor]) -> float:
    """Return the mean tokens of one greedy draft-verify cycle from every true prefix.

    The function that computes it is shipped with the export.
    """
    package = type(model).__module__.rpartition(".")[0]
    names = [f"{package}.{module}" for module in SPECULATION_MODULES]
    speculation = importlib.import_module(next(name for name in names if importlib.util.find_spec(name)))
    counts = [speculation.real_context_acceptance(model, group, model.config.block_size) for group in contexts]
    return float(torch.cat(counts).double().mean())


def measure_mode(
    mode: str, run: Continuations, ar: Continuations, real_context_acceptance: float | None = None
) -> ModeMeasurement:
    """Count what one mode did."""
    new_tokens, num_forwards = sum(map(len, run.tokens)), sum(run.num_forwards)
    return ModeMeasurement(
        new_tokens=new_tokens,
        num_forwards=num_forwards,
        tokens_per_forward=new_tokens / num_forwards,
        acceptance_length=_compute_acceptance_length(mode, run),
        real_context_acceptance=real_context_acceptance,
        tokens_per_second=new_tokens / run.seconds,
        equals_greedy_ar=run.tokens == ar.tokens,
        distinct_4grams=sum(map(compute_distinct_share, run.tokens)) / len(run.tokens),
    )


def _compute_acceptance_length(mode: str, run: Continuations) -> float | None:
    """Return the mean tokens per draft-verify cycle; None for a mode that does not draft.

    The prefill is one forward and emits one token. A lone last token of linear speculation is a cycle of one forward.
    """
    if mode not in FORWARDS_PER_CYCLE:
        return None
    cycles = sum(math.ceil((forwards - 1) / FORWARDS_PER_CYCLE[mode]) for forwards in run.num_forwards)
    return sum(len(tokens) - 1 for tokens in run.tokens) / max(1, cycles)


def decode_sample(export: Path, prompt: Tensor, continuation: list[int]) -> dict[str, str]:
    """Return the text of one prompt and its continuation."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    return {"prompt": tokenizer.decode(prompt.tolist()), "continuation": tokenizer.decode(continuation)}
