"""Times a small model, where overhead dominates, against plain loops over transformers."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.bench.decode.loops import LOOPS
from tests.bench.decode.models import MASK_TOKEN_ID, Sizes, make_model, make_twin
from tests.bench.timing import time_interleaved

SIZES = Sizes(512, 256, 768, 4, 4, 2, initializer_range=0.1)
PROMPT_TOKENS, NEW_TOKENS, THRESHOLD = 64, 48, 0.9
BLOCK_LENGTHS = (8, 32)  # those in use
WANTED = {"ar": 1.5, "block_diffusion": 1.15, "linear": 1.15, "quadratic": 1.15}
QUADRATIC_BLOCK_LENGTHS = (8,)  # with 32 a forward has 1056 positions, and matmuls dominate


def measure_small_model(rounds: int) -> dict[str, Any]:
    """Return {sizes, by_mode: {mode or mode@block: {tokens_per_second, loop_tokens_per_second, ratio}}}.

    Raises:
        AssertionError: a loop decodes other tokens than we do, or in another number of forwards.
    """
    model = make_model(SIZES, seed=1)
    twin = make_twin(model, SIZES)
    prompt = torch.randint(0, MASK_TOKEN_ID, (1, PROMPT_TOKENS))
    results = {}
    for mode in LOOPS:
        for block_length in (None,) if mode == "ar" else BLOCK_LENGTHS:
            if mode == "quadratic" and block_length not in QUADRATIC_BLOCK_LENGTHS:
                continue
            name = mode if block_length is None else f"{mode}@{block_length}"
            results[name] = compare(model, twin, prompt, mode, block_length, rounds)
    return {"sizes": asdict(SIZES), "by_mode": results}


def compare(model: Any, twin: Any, prompt: torch.Tensor, mode: str, block_length: int | None, rounds: int) -> dict:
    """Time one mode, both ways."""
    threshold = THRESHOLD if mode == "block_diffusion" else None
    options = DecodeOptions(NEW_TOKENS, block_length=block_length, threshold=threshold, eos_token_id=[])
    given = [value for value in (block_length, MASK_TOKEN_ID if block_length else None, threshold) if value is not None]
    ours, loop = partial(decode, model, mode, prompt, options), partial(LOOPS[mode], twin, prompt, NEW_TOKENS, *given)
    result, (tokens, num_forwards) = ours(), loop()
    assert result.output_ids[0, PROMPT_TOKENS:].tolist() == tokens, f"{mode}: the loop decodes other tokens"
    assert result.num_forwards == num_forwards, f"{mode}: the loop takes another number of forwards"
    loop_seconds, seconds = time_interleaved([loop, ours], rounds)
    return {
        "tokens_per_second": NEW_TOKENS / seconds,
        "loop_tokens_per_second": NEW_TOKENS / loop_seconds,
        "ratio": loop_seconds / seconds,
        "num_forwards": num_forwards,
    }
