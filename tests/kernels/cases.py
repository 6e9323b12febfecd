"""The list of cases: everything that torch compiles for a run on CUDA, at the shapes of the released sizes and small.

Small ones are interpreted too: their heads are those of one of 8 tensor-parallel ranks, their lengths have tails.
"""

from dataclasses import dataclass
from functools import cache

from tests.kernels.attention_cases import AttentionCase, list_attention_cases, list_shard_cases, list_tail_cases
from tests.kernels.bench_cases import list_bench_cases
from tests.kernels.case import Case
from tests.kernels.decoding_cases import list_decoding_cases
from tests.kernels.elementwise_cases import RotationCase, SwiGLUCase, list_rotation_cases


@dataclass(frozen=True)
class Shape:
    """What recipes give one tensor-parallel rank: clean tokens of a sequence, heads, and inner width of the MLP.

    has_all_forms: whether AR under packed texts and chats, and on context ranks, is compiled, too.
    """

    label: str
    length: int
    query_heads: int
    key_heads: int
    width: int
    has_all_forms: bool = True


SHAPES = (
    Shape("3b_tp1", 4096, 32, 8, 9216),
    Shape("8b_tp4", 4096, 8, 2, 3584),
    Shape("14b_tp8", 4096, 4, 1, 2048, has_all_forms=False),
)
SFT_SHAPES = (
    Shape("3b_tp4_sft", 16384, 8, 2, 2304),
    Shape("8b_tp8_sft", 16384, 4, 1, 1792),
    Shape("14b_tp8_sft", 16384, 4, 1, 2048),
)
LARGE_DECODING = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}
SMALL_DECODING = {
    "num_hidden_layers": 1,  # float16 rounds the hidden states between layers, with or without kernels
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
}
OTHER_FORMS_OF_AR = "attention/ar_"
# Compiled small alone: they differ from another case in the values of tables, not in a program (test_kernels.py).
SAME_PROGRAMS = {
    "attention/ar_texts_one/": "attention/ar/",
    "attention/joint_texts_one/": "attention/joint/",
    "attention/ar_rank_1_of_2/": "attention/ar_rank_0_of_2/",
    "attention/joint_rank_1_of_2/": "attention/joint_rank_0_of_2/",
}


@cache
def list_large_cases() -> tuple[Case, ...]:
    """Return the cases that are compiled at the shapes of released sizes."""
    cases: list[Case] = []
    for shape in SHAPES:
        sizes = (shape.length, shape.query_heads, shape.key_heads, shape.label)
        attention = [*list_attention_cases(*sizes), *list_shard_cases(*sizes)]
        cases += [case for case in attention if shape.has_all_forms or not case.name.startswith(OTHER_FORMS_OF_AR)]
        cases += [*list_rotation_cases(*sizes), _make_swiglu(shape), *_list_doubled(shape)]
    for shape in SFT_SHAPES:
        sizes = (shape.length, shape.query_heads, shape.key_heads, shape.label)
        chats = [*list_attention_cases(*sizes), *list_shard_cases(*sizes)]
        cases += [case for case in chats if case.name.startswith("attention/joint_chats_one")]
        cases += _list_doubled(shape)
    return (
        *(case for case in cases if not case.name.startswith(tuple(SAME_PROGRAMS))),
        *list_decoding_cases(LARGE_DECODING, 1000, 4096, 32, "8b"),
        *list_bench_cases(4096, 32, 8, "8b"),
    )


def _list_doubled(shape: Shape) -> list[RotationCase | SwiGLUCase]:
    """Return what is computed element by element for [noisy | clean] of one sequence."""
    sizes = (2 * shape.length, shape.query_heads, shape.key_heads, f"{shape.label}_doubled")
    single = [case for case in list_rotation_cases(*sizes) if case.num_sequences == 1]
    return [*single, _make_swiglu(shape, doubled=True)]


def _make_swiglu(shape: Shape, *, doubled: bool = False) -> SwiGLUCase:
    label, factor = (f"{shape.label}_doubled", 2) if doubled else (shape.label, 1)
    return SwiGLUCase(f"swiglu/megatron/{label}", factor * shape.length, 1, shape.width)


@cache
def list_small_cases() -> tuple[Case, ...]:
    """Return the cases that are interpreted."""
    attention: list[AttentionCase] = [
        *list_attention_cases(160, 4, 1, "small"),
        *list_shard_cases(256, 4, 1, "small"),
        *list_tail_cases(4, 1, "small"),
    ]
    elementwise = [*list_rotation_cases(150, 4, 2, "small"), SwiGLUCase("swiglu/megatron/small", 37, 2, 50)]
    bench = list_bench_cases(150, 4, 1, "small")
    return (*attention, *elementwise, *list_decoding_cases(SMALL_DECODING, 70, 203, 8, "small"), *bench)


def find_case(name: str) -> tuple[Case, bool]:
    """Return the case of this name, and whether it is interpreted; raise KeyError where there is none."""
    found = {case.name: (case, False) for case in list_large_cases()}
    found |= {case.name: (case, True) for case in list_small_cases()}
    return found[name]
