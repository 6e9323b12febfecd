"""Context parallelism trains the same model: losses, gradients and weights of every stage against one process, packed
documents included, alone and with every other kind of parallelism; checkpoints go both ways."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pytest
from torch import Tensor

from data_pipeline.standard_library import load_standard_library
from tests.distributed.test_checkpoint import load_tensors
from tests.distributed.test_layouts import LOSSES
from tests.helpers.processes import load_lines, train_many
from tests.helpers.toy_data import ToyData, prepare_texts

LENGTH, STEPS = 256, 2
CP4 = ["parallel=cp2", "parallel.context_parallel=4"]
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Texts follow each other (ar), in whole blocks with completions (joint); chats with filler and contexts (sft).
CASES = {
    "ar": ["stage=ar"],
    "ar_long": ["stage=ar", "data.train={long}"],
    "joint_8": ["stage=joint", "stage.block_size=8"],
    "joint_8_long": ["stage=joint", "stage.block_size=8", "data.train={long}"],
    "joint_32": ["stage=joint", "stage.block_size=32"],
    "joint_32_long": ["stage=joint", "stage.block_size=32", "data.train={long}"],
    "sft_32": ["stage=sft", "stage.block_size=32"],
}
LAYOUTS = {
    "cp2": (2, ["parallel=cp2"]),
    "cp2_full": (2, ["parallel=cp2", "parallel.recompute=full"]),
    "cp2_selective": (2, ["parallel=cp2", "parallel.recompute=selective"]),
    "cp4": (4, CP4),
    "cp2_tp2": (4, ["parallel=cp2", "parallel.tensor_parallel=2"]),
    "cp2_tp2_sp": (4, ["parallel=tp2_sp_cp2"]),
    "cp2_tp2_sp_full": (4, ["parallel=tp2_sp_cp2", "parallel.recompute=full"]),
    "cp2_pp2": (4, ["parallel=pp2", "parallel.context_parallel=2"]),
    "cp2_pp2_interleaved": (4, ["parallel=pp2_interleaved", "parallel.context_parallel=2"]),
    "cp2_dp2_overlapped": (4, ["parallel=cp2", *OVERLAPPED]),
}
CHOSEN = [
    ("cp2", "ar"),
    ("cp2", "sft_32"),
    ("cp4", "joint_8"),
    ("cp2_tp2_sp_full", "joint_8"),
    ("cp2_pp2", "joint_8"),
    ("cp2_dp2_overlapped", "sft_32"),
]
OTHERS = [(layout, case) for layout in LAYOUTS for case in CASES if (layout, case) not in CHOSEN]
# The layouts of the first step and of the second one, on two ranks.
RESUMED = {"from_cp1": ("parallel=single", "parallel=cp2"), "from_cp2": ("parallel=cp2", "parallel=single")}
COUNTS = ("text_tokens", "context_tokens", "completion_tokens", "filler_rows", "masked_tokens")


@pytest.fixture(scope="module")
def data(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """As everywhere, and beside it texts so long that most sequences are of one document."""
    long = toy_data.train.parent / "long"
    if not long.exists():
        prepare_texts(load_standard_library().train[:8], toy_data.tokenizer, long)
    return toy_data


def job(data: ToyData, root: Path, name: str, case: str, overrides: list[str], steps: int = STEPS) -> list[str]:
    """A run under root/name that saves at its end, at a learning rate that does not depend on when that is."""
    long = data.train.parent / "long"
    options = [option.format(long=long) for option in CASES[case]]
    batch = ["train.global_batch_size=4", "train.micro_batch_size=2", f"data.sequence_length={LENGTH}"]
    ends = [f"train.tokens={steps * 4 * LENGTH}", "evaluation.sequences=3"]
    rate = ["schedule.final_lr=1e-3", "schedule.warmup_fraction=0"]
    where = [f"run.root={root}", f"run.name={name}"]
    return [*data.overrides("stage=sft" in options), *options, *batch, *ends, *rate, *overrides, *where]


def train_layouts(data: ToyData, root: Path, pairs: Iterable[tuple[str, str]], others: list[list[str]]) -> None:
    """Runs of (layout, case), of one process for each case among them, and other jobs on two ranks."""
    pairs = list(pairs)
    cases = dict.fromkeys(case for _, case in pairs)
    train_many(1, [job(data, root, f"single_{case}", case, ["parallel=single"]) for case in cases], root, timeout=900)
    for num_ranks in (2, 4):
        jobs = [
            job(data, root, f"{layout}_{case}", case, LAYOUTS[layout][1])
            for layout, case in pairs
            if LAYOUTS[layout][0] == num_ranks
        ]
        train_many(num_ranks, [*jobs, *(others if num_ranks == 2 else [])], root, timeout=1700)


@pytest.fixture(scope="module")
def root(data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("context")
    resumed = [
        job(data, root, name, "joint_8", [layout], steps)
        for name, layouts in RESUMED.items()
        for steps, layout in enumerate(layouts, start=1)
    ]
    train_layouts(data, root, CHOSEN, resumed)
    return root


def assert_trains_alike(mine: Path, its: Path) -> None:
    """Losses and gradient norms within 1e-5, counts exactly; at the end weights, and the gradients' running mean."""
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
        # Adam makes rounding visible in the second step's gradients.
        tolerance = 1e-5 if name.startswith("optimizer.state.param.") else 2e-5
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm(), name


@lru_cache(maxsize=8)
def load_end(run: Path) -> dict[str, Tensor]:
    """fp32 weights and Adam's first moments of a run's last checkpoint."""
    tensors = load_tensors(run / "checkpoints" / f"step_{STEPS:08d}")
    parts = ("optimizer.state.param.", "optimizer.state.exp_avg.")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}


@pytest.mark.parametrize(("layout", "case"), CHOSEN)
def test_a_layout_trains_like_one_process(root: Path, layout: str, case: str) -> None:
    assert_trains_alike(root / f"{layout}_{case}", root / f"single_{case}")


def test_the_cases_hold_what_they_are_for(root: Path) -> None:
    joint, sft = (load_lines(root / f"single_{case}", "train") for case in ("joint_8", "sft_32"))
    assert all(line["completion_tokens"] > 0 for line in (*joint, *sft))
    assert all(line["filler_rows"] > 0 and line["context_tokens"] > 0 for line in sft)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_or_without_context_parallelism(root: Path, name: str) -> None:
    assert_trains_alike(root / name, root / "single_joint_8")
    assert [line["step"] for line in load_lines(root / name, "restore")] == [1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_trains_like_one_process(data: ToyData, tmp_path: Path) -> None:
    train_layouts(data, tmp_path, OTHERS, [])
    for layout, case in OTHERS:
        assert_trains_alike(tmp_path / f"{layout}_{case}", tmp_path / f"single_{case}")
