"""Times one forward of each kind against its floor: the bare matmuls of the same shapes, in the same run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.hf.attention_mask import make_group_layout
from model.hf.cache import CachedModel
from model.hf.decoding import decode
from model.hf.options import LINEAR, MODES, DecodeOptions
from model.hf.session import open_session
from tests.bench.decode.models import MASK_TOKEN_ID, Sizes, make_model
from tests.bench.timing import time_interleaved

SIZES = Sizes(32768, 512, 1536, 8, 8, 2)
NUM_CACHED, BLOCK_LENGTH, NUM_GROUPS = 512, 32, 2
WANTED = {"draft": 1.10, "verify": 1.10, "step": 1.25}


@torch.no_grad()
def measure_forwards(rounds: int) -> dict[str, Any]:
    """Time forwards after 512 cached tokens; draft_and_verify computes the masks of two groups.

    Returns:
        by_kind: {kind: {seconds, floor_seconds, ratio, num_positions, num_head_positions}}.
        prefill_head_positions: positions of the prefill that reach the head, by mode.
    """
    model = make_model(SIZES)
    prompt = torch.randint(0, MASK_TOKEN_ID, (1, NUM_CACHED))
    options = DecodeOptions(64, block_length=BLOCK_LENGTH, eos_token_id=[])
    session = open_session(model, LINEAR, prompt, None, options, largest_forward=BLOCK_LENGTH * (1 + NUM_GROUPS))
    session.prefill()
    forwards = _make_forwards(session.model, torch.randint(0, MASK_TOKEN_ID, (1, BLOCK_LENGTH * (1 + NUM_GROUPS))))
    functions: list[Callable[[], object]] = []
    for function, num_positions, num_head_positions in forwards.values():
        functions += [make_floor(model, num_positions, num_head_positions), function]
    seconds = time_interleaved(functions, rounds)
    return {
        "by_kind": {
            kind: {
                "seconds": mine,
                "floor_seconds": floor,
                "ratio": mine / floor,
                "num_positions": num_positions,
                "num_head_positions": num_head_positions,
            }
            for (kind, (_, num_positions, num_head_positions)), floor, mine in zip(
                forwards.items(), seconds[::2], seconds[1::2], strict=True
            )
        },
        "prefill_head_positions": count_prefill_head_positions(model, prompt, options),
    }


def _make_forwards(cached: CachedModel, tokens: Tensor) -> dict[str, tuple[Callable[[], Tensor], int, int]]:
    """Return by kind the forward with its logits, its positions, and how many of them reach the head.

    The decode loops run them so, up to the choice of tokens. Nothing stays in the cache, so they can be repeated.
    """
    block, seed = tokens[:, :BLOCK_LENGTH], tokens[:, :1]
    both_ways, causal, single = (
        cached.layout(BLOCK_LENGTH, bidirectional=True),
        cached.layout(BLOCK_LENGTH),
        cached.layout(1),
    )
    groups = make_group_layout(
        BLOCK_LENGTH - 1, torch.arange(NUM_GROUPS)[None], BLOCK_LENGTH, is_reused=True
    )  # fmt: skip
    last = BLOCK_LENGTH - 1 + BLOCK_LENGTH

    def draft_and_verify() -> Tensor:
        hidden = cached.encode("draft_and_verify", tokens, groups)
        cached.project(hidden[:, :BLOCK_LENGTH])
        return cached.project(hidden[:, BLOCK_LENGTH:last])

    return {
        "draft": (
            lambda: cached.project(cached.encode("draft", block, both_ways)[:, 1:]),
            BLOCK_LENGTH,
            BLOCK_LENGTH - 1,
        ),
        "verify": (lambda: cached.project(cached.encode("verify", block, causal)), BLOCK_LENGTH, BLOCK_LENGTH),
        "step": (lambda: cached.project(cached.encode("step", seed, single)), 1, 1),
        "draft_and_verify": (draft_and_verify, tokens.shape[1], last),
    }


def make_floor(model: Any, num_positions: int, num_head_positions: int) -> Callable[[], None]:
    """Return a function that runs the matmuls of a forward of num_positions tokens after NUM_CACHED ones, alone.

    They are projections, attention scores and weighted sums (the heads of a group are folded into positions), and the
    head on the positions that are read. All operands exist already.
    """
    config = model.config
    groups, head_dim = config.num_key_value_heads, config.head_dim
    num_seen, folded = NUM_CACHED + num_positions, config.num_attention_heads // groups * num_positions
    hidden, attended = (
        torch.randn(1, num_positions, config.hidden_size),
        torch.randn(1, num_positions, model_width(config)),
    )
    inner, read = (
        torch.randn(1, num_positions, config.intermediate_size),
        torch.randn(1, num_head_positions, config.hidden_size),
    )
    query, scores = torch.randn(1, groups, folded, head_dim), torch.rand(1, groups, folded, num_seen)
    key, value = torch.randn(2, 1, groups, num_seen, head_dim)
    layers = [
        (
            [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight],
            layer.self_attn.o_proj.weight,
            [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight],
            layer.mlp.down_proj.weight,
        )
        for layer in model.encoder.layers
    ]

    def run() -> None:
        for from_hidden, output, from_normed, down in layers:
            for weight in from_hidden:
                linear(hidden, weight)
            torch.matmul(query, key.transpose(2, 3))
            torch.matmul(scores, value)
            linear(attended, output)
            for weight in from_normed:
                linear(hidden, weight)
            linear(inner, down)
        linear(read, model.diffusion_head.weight)

    return run


def model_width(config: Any) -> int:
    """Return the width of all query heads together."""
    return config.num_attention_heads * config.head_dim


def count_prefill_head_positions(model: Any, prompt: Tensor, options: DecodeOptions) -> dict[str, int]:
    """Count the prefill's positions that reach the head, by mode: one, and in quadratic those of its first draft."""
    counts: dict[str, int] = {}
    for mode in MODES:
        forwards: list[int] = []  # head positions of each
        hooks = [
            model.encoder.register_forward_pre_hook(lambda *_, to=forwards: to.append(0)),
            model.diffusion_head.register_forward_pre_hook(
                lambda _, inputs, to=forwards: to.append(to.pop() + inputs[0].numel() // inputs[0].shape[-1])
            ),
        ]
        # Two tokens: with one there is nothing to draft.
        two_tokens = DecodeOptions(2, block_length=options.block_length, eos_token_id=[])
        decode(model, mode, prompt, two_tokens.for_mode(mode))
        for hook in hooks:
            hook.remove()
        counts[mode] = forwards[0]
    return counts
