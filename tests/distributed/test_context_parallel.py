"""Context parallelism trains the same model, alone and with every other kind of parallelism.

Losses, gradients and weights of every stage are compared with those of one process, packed documents included;
checkpoints go both ways. Its attention has the dense mask's values and gradients and sends the formula's bytes exactly.
"""

import json
from functools import lru_cache
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conf.composition.compose import compose_size
from data_pipeline.toy.corpus import load_standard_library
from launch.plan.communication import clean_keys_bytes, estimate_traffic
from launch.plan.rank_shape import build_rank_shape
from model.attention.context import MIN_CHUNK_LENGTH
from tests.distributed.test_checkpoint import load_tensors
from tests.distributed.test_layouts import LOSSES
from tests.helpers.layouts import CP2, PP2, PP2_INTERLEAVED, TP2_SP_CP2, TP8_SP_CP4
from tests.helpers.processes import load_lines, run_ranks, train_many
from tests.helpers.toy_data import ToyData, prepare_texts
from tests.helpers.train_jobs import WHOLE

LENGTH, STEPS = 256, 2
CP4 = ["parallel.context_parallel=4"]
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Texts follow each other (ar), in whole blocks with block padding (joint); chats with padding and contexts (sft).
CASES = {
    "ar": ["stage=ar"],
    "ar_long": ["stage=ar", "data.train={long}"],
    "joint_8": ["stage=joint", "stage.block_size=8"],
    "joint_8_long": ["stage=joint", "stage.block_size=8", "data.train={long}"],
    "joint_32": ["stage=joint", "stage.block_size=32"],
    "joint_32_long": ["stage=joint", "stage.block_size=32", "data.train={long}"],
    "joint_32_rounds": ["stage=joint", "stage.block_size=32"],
    "sft_32": ["stage=sft", "stage.block_size=32"],
}
LAYOUTS = {
    "cp2": (2, CP2),
    "cp2_full": (2, [*CP2, "parallel.recompute=full"]),
    "cp2_selective": (2, [*CP2, "parallel.recompute=selective"]),
    "cp4": (4, CP4),
    "cp2_tp2": (4, [*CP2, "parallel.tensor_parallel=2"]),
    "cp2_tp2_sp": (4, TP2_SP_CP2),
    "cp2_tp2_sp_full": (4, [*TP2_SP_CP2, "parallel.recompute=full"]),
    "cp2_pp2": (4, [*PP2, "parallel.context_parallel=2"]),
    "cp2_pp2_interleaved": (4, [*PP2_INTERLEAVED, "parallel.context_parallel=2"]),
    "cp2_dp2": (4, CP2),
    "cp2_dp2_overlapped": (4, [*CP2, *OVERLAPPED]),
}
CHOSEN = [
    ("cp4", "ar"),
    ("cp4", "joint_8"),
    ("cp2_tp2_sp_full", "joint_8"),
    ("cp2_pp2", "joint_32_long"),
    ("cp2_dp2", "joint_32_long"),
    ("cp2_dp2_overlapped", "sft_32"),
]
LONG = ("cp2", "joint_32_rounds")  # long enough for two rounds of chunks
OTHERS = [(layout, case) for layout in LAYOUTS for case in CASES if (layout, case) not in CHOSEN]
OTHERS = [pair for pair in OTHERS if pair[1] != LONG[1] or pair == LONG]
# The layouts of the first step and of the second one, on four ranks.
DP4 = ["parallel=single", "train.micro_batch_size=1"]
RESUMED = {"from_cp1": (DP4, CP2), "from_cp2": (CP2, DP4)}
COUNTS = ("text_tokens", "context_tokens", "block_padding_tokens", "padding_tokens", "masked_tokens")


# Texts [n] and chats [prompt, response, ...], two sequences each: one document; several with block padding and padding.
ONE = [[[LENGTH]], [[LENGTH]]]
PACKED = [[[20, 45], [33], [40, 20]], [[100], [3, 60]]]
SIZES, NUM_RANKS = (2, 4), 4  # smaller groups are several


def attention(sequences: list[list[list[int]]], block_size: int, doubled: bool, **changes: Any) -> dict[str, Any]:
    shared = {"sequences": sequences, "length": LENGTH, "block_size": block_size, "doubled": doubled}
    return {**shared, "recompute": False, "dtype": "float32", **changes}


ATTENTION = {
    "ar": attention(ONE, 8, doubled=False),
    "ar_packed": attention(PACKED, 8, doubled=False),
    "joint_8": attention(ONE, 8, doubled=True),
    "joint_32": attention(ONE, 32, doubled=True),
    "joint_8_packed": attention(PACKED, 8, doubled=True),
    "joint_32_packed": attention(PACKED, 32, doubled=True),
    "ar_packed_rounds": attention(PACKED, 8, doubled=False, min_chunk_length=8),
    "joint_8_packed_rounds": attention(PACKED, 8, doubled=True, min_chunk_length=16),
    "joint_8_recomputed": attention(ONE, 8, doubled=True, recompute=True),
    "joint_8_bfloat16": attention(ONE, 8, doubled=True, dtype="bfloat16"),
}


@pytest.fixture(scope="module")
def data(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """Add to the shared data texts so long that most sequences are of one document."""
    long = toy_data.train.parent / "long"
    if not long.exists():
        prepare_texts(load_standard_library().train[:8], toy_data.tokenizer, long)
    return toy_data


def job(data: ToyData, root: Path, name: str, case: str, overrides: list[str], steps: int = STEPS) -> list[str]:
    """Return the overrides of a run under root/name that saves at its end.

    Its learning rate does not depend on when the end is.
    """
    long = data.train.parent / "long"
    options = [option.format(long=long) for option in CASES[case]]
    length = LENGTH if case != LONG[1] else 4 * MIN_CHUNK_LENGTH * 2
    batch = ["train.global_batch_size=4", "train.micro_batch_size=2", f"data.sequence_length={length}"]
    ends = [f"train.tokens={steps * 4 * length}", "evaluation.sequences=3"]
    rate = ["schedule.final_lr=1e-3", "schedule.warmup_fraction=0"]
    where = [f"run.root={root}", f"run.name={name}"]
    return [*data.overrides("stage=sft" in options), *options, *batch, *ends, *rate, *overrides, *where]


def train_singles(data: ToyData, root: Path, cases: list[tuple[str, str]]) -> None:
    """Train one run of one process, with all noisy blocks, for each case among (layout, case)."""
    chosen = dict.fromkeys(case for _, case in cases)
    train_many(
        1, [job(data, root, f"single_{case}", case, ["parallel=single", WHOLE]) for case in chosen], root, timeout=900
    )


def list_jobs(data: ToyData, root: Path, cases: list[tuple[str, str]], num_ranks: int) -> list[list[str]]:
    """List the overrides of the runs of (layout, case) that take `num_ranks` ranks."""
    chosen = [(layout, case) for layout, case in cases if LAYOUTS[layout][0] == num_ranks]
    return [job(data, root, f"{layout}_{case}", case, LAYOUTS[layout][1]) for layout, case in chosen]


@pytest.fixture(scope="module")
def root(data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders and what the attention jobs found, from one set of processes: starting costs more than runs."""
    root = tmp_path_factory.mktemp("context")
    train_singles(data, root, CHOSEN)
    resumed = [
        job(data, root, name, "joint_8", layout, steps)
        for name, layouts in RESUMED.items()
        for steps, layout in enumerate(layouts, start=1)
    ]
    jobs = {"attention": dict.fromkeys(SIZES, ATTENTION), "runs": [*list_jobs(data, root, CHOSEN, 4), *resumed]}
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(NUM_RANKS, "tests.helpers.context_jobs", str(root / "jobs.json"), str(root))
    return root


def assert_trains_alike(mine: Path, its: Path) -> None:
    """Compare losses and gradient norms within 1e-5, counts exactly; at the end weights and Adam's first moments."""
    for kind in ("train", "heldout"):
        theirs_by_step = {line["step"]: line for line in load_lines(its, kind)}
        for ours in load_lines(mine, kind):
            if ours["step"] not in theirs_by_step:
                continue  # of a part that ended there
            theirs = theirs_by_step[ours["step"]]
            keys = [key for key in LOSSES if theirs[key] is not None] + (["grad_norm"] if kind == "train" else [])
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-5)
            assert all(ours[key] == theirs[key] for key in COUNTS if key in theirs)
        assert load_lines(mine, kind)[-1]["step"] == STEPS
    ours, theirs = load_end(mine), load_end(its)
    assert len(theirs) == 2 * (4 * 6 + 3)
    for name, tensor in theirs.items():
        # Adam's first step makes rounding visible in the second one's gradients (2e-5 with tensor parallelism alone).
        tolerance = 1e-5 if name.startswith("optimizer.state.param.") else 5e-5
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm(), name


@lru_cache(maxsize=8)
def load_end(run: Path) -> dict[str, Tensor]:
    """Load fp32 weights and Adam's first moments of a run's last checkpoint."""
    tensors = load_tensors(run / "checkpoints" / f"step_{STEPS:08d}")
    parts = ("optimizer.state.param.", "optimizer.state.exp_avg.")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}


@pytest.mark.parametrize(("layout", "case"), CHOSEN)
def test_a_layout_trains_like_one_process(root: Path, layout: str, case: str) -> None:
    assert_trains_alike(root / f"{layout}_{case}", root / f"single_{case}")


def test_the_cases_hold_what_they_are_for(root: Path) -> None:
    joint, sft = (load_lines(root / f"single_{case}", "train") for case in ("joint_8", "sft_32"))
    assert all(line["block_padding_tokens"] > 0 for line in (*joint, *sft))
    assert all(line["padding_tokens"] > 0 and line["context_tokens"] > 0 for line in sft)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_or_without_context_parallelism(root: Path, name: str) -> None:
    assert_trains_alike(root / name, root / "single_joint_8")
    assert [line["step"] for line in load_lines(root / name, "restore")] == [1]


def load_found(root: Path, size: int, name: str) -> list[dict[str, Any]]:
    """Load what every rank found in an attention job."""
    files = [root / f"{size}_{name}_rank{rank}.json" for rank in range(NUM_RANKS)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ATTENTION)
def test_every_rank_computes_its_part_of_the_dense_mask(root: Path, name: str, size: int) -> None:
    exact = ATTENTION[name]["dtype"] == "float32"
    for rank in load_found(root, size, name):
        assert rank["output"] <= (1e-5 if exact else 0.02)
        assert rank["gradients"] <= (1e-5 if exact else 0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ATTENTION)
def test_the_bytes_sent_are_those_of_the_formula(root: Path, name: str, size: int) -> None:
    job = ATTENTION[name]
    overrides = [
        f"stage={'joint' if job['doubled'] else 'ar'}",
        f"stage.block_size={job['block_size']}",
        f"precision={'fp32' if job['dtype'] == 'float32' else 'bf16'}",
        f"parallel.recompute={'selective' if job['recompute'] else 'none'}",
        f"parallel.context_parallel={size}",
        "train.micro_batch_size=2",
        "train.global_batch_size=2",
    ]
    config = compose_size(
        ["model=tiny", "model.num_layers=1", f"data.sequence_length={LENGTH}", "train.tokens=1e6", *overrides]
    )
    traffic = [item for item in estimate_traffic(build_rank_shape(config, size)) if item.group == "context"]
    expected = {item.operation: item.num_bytes for item in traffic}
    assert all(rank["sent"] == expected for rank in load_found(root, size, name))


@pytest.mark.parametrize("size", SIZES)
def test_the_joint_stage_sends_what_the_autoregressive_one_does(root: Path, size: int) -> None:
    ar, joint = load_found(root, size, "ar"), load_found(root, size, "joint_8")
    assert [rank["sent"] for rank in ar] == [rank["sent"] for rank in joint]


def test_the_message_is_clean_keys_and_values_of_whole_sequences() -> None:
    config = compose_size(["experiment=nld_8b_joint", *TP8_SP_CP4, "data.sequence_length=262144"])
    # 2 (keys, values) * 262144 tokens * 8 heads / TP 8 * 128 * 2 bytes
    assert clean_keys_bytes(build_rank_shape(config, 32)) == 2 * 262144 * 1 * 128 * 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_trains_like_one_process(data: ToyData, tmp_path: Path) -> None:
    train_singles(data, tmp_path, OTHERS)
    for num_ranks in (2, 4):
        # A few runs at a time: megatron-core never ends the threads of gloo's groups.
        for jobs in batched(list_jobs(data, tmp_path, OTHERS, num_ranks), 8):
            train_many(num_ranks, list(jobs), tmp_path, timeout=600)
    for layout, case in OTHERS:
        assert_trains_alike(tmp_path / f"{layout}_{case}", tmp_path / f"single_{case}")
