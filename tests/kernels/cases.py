"""The list of cases: everything that torch compiles for a run on CUDA, at the shapes of the released sizes and small.

Small ones are interpreted too: their heads are those of one of 8 tensor-parallel ranks, their lengths have tails.
"""

from functools import cache

from tests.kernels.attention_cases import AttentionCase, list_attention_cases, list_shard_cases, list_tail_cases
from tests.kernels.case import Case
from tests.kernels.decoding_cases import list_decoding_cases
from tests.kernels.elementwise_cases import SwiGLUCase, list_rotation_cases

LENGTH = 4096  # clean tokens of a training sequence
# Recipe: query heads and key heads of a rank, and its inner width of the MLP.
SHAPES = {"3b_tp1": (32, 8, 9216), "8b_tp4": (8, 2, 3584), "14b_tp8": (4, 1, 2048)}
LARGE_DECODING = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}
# One layer: float16 rounds the hidden states between layers, with or without kernels.
SMALL_DECODING = LARGE_DECODING | {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
}
# Every kind of mask and every rotation is compiled in one shape. Others differ in their number of heads alone.
# Left out: AR under chats, which no recipe has, and ranks whose kernels differ from others here in a length alone.
EVERY_FORM = "8b_tp4"
LEFT_OUT = ("attention/ar_chats/", "attention/ar_rank_0_of_2/", "attention/joint_chats_rank_0_of_2/")


@cache
def list_large_cases() -> tuple[Case, ...]:
    """Return the cases that are compiled at the shapes of released sizes."""
    cases: list[Case] = []
    for label, (query_heads, key_heads, width) in SHAPES.items():
        sizes = (LENGTH, query_heads, key_heads, label)
        attention = [*list_attention_cases(*sizes), *list_shard_cases(*sizes)]
        attention = [case for case in attention if not case.name.startswith(LEFT_OUT)]
        cases += [case for case in attention if label == EVERY_FORM or "/joint/" in case.name]
        cases += list_rotation_cases(LENGTH, query_heads, key_heads, label) if label == EVERY_FORM else []
        cases.append(SwiGLUCase(f"swiglu/megatron/{label}", LENGTH, 1, width))
    return (*cases, *list_decoding_cases(LARGE_DECODING, 1000, 4096, 32, "8b"))


@cache
def list_small_cases() -> tuple[Case, ...]:
    """Return the cases that are interpreted."""
    attention: list[AttentionCase] = [
        *list_attention_cases(160, 4, 1, "small"),
        *list_shard_cases(256, 4, 1, "small"),
        *list_tail_cases(4, 1, "small"),
    ]
    elementwise = [*list_rotation_cases(150, 4, 2, "small"), SwiGLUCase("swiglu/megatron/small", 37, 2, 50)]
    return (*attention, *elementwise, *list_decoding_cases(SMALL_DECODING, 70, 203, 8, "small"))


def find_case(name: str) -> tuple[Case, bool]:
    """Return the case of this name, and whether it is interpreted; raise KeyError where there is none."""
    found = {case.name: (case, False) for case in list_large_cases()}
    found |= {case.name: (case, True) for case in list_small_cases()}
    return found[name]
