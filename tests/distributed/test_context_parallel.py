"""Context parallelism trains the same model: losses, gradients and weights of every stage against one process, packed
documents included, alone and with every other kind of parallelism; checkpoints go both ways."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

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
    "cp2_pp2": (4, ["parallel=pp2", "parallel.context_parallel=2"]),
    "cp2_pp2_interleaved": (4, ["parallel=pp2_interleaved", "parallel.context_parallel=2"]),
    "cp2_dp2_overlapped": (4, ["parallel=cp2", *OVERLAPPED]),
}
CHOSEN = [
    ("cp2", "ar"),
    ("cp2", "joint_8"),
    ("cp2_full", "joint_32_long"),
    ("cp2", "sft_32"),
    ("cp4", "ar"),
    ("cp4", "joint_8"),
    ("cp2_tp2_sp", "joint_8"),
    ("cp2_pp2", "joint_32_long"),
    ("cp2_dp2_overlapped", "sft_32"),
]
OTHERS = [(layout, case) for layout in LAYOUTS for case in CASES if (layout, case) not in CHOSEN]
RESUMED = {"from_cp1": ("single", ["parallel=cp2"]), "from_cp2": ("cp2", ["parallel=single"])}
COUNTS = ("text_tokens", "context_tokens", "completion_tokens", "filler_rows", "masked_tokens")


@pytest.fixture(scope="module")
def data(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """As everywhere, and beside it texts so long that most sequences are of one document."""
    long = toy_data.train.parent / "long"
    if not long.exists():
        prepare_texts(load_standard_library().train[:8], toy_data.tokenizer, long)
    return toy_data


def job(data: ToyData, root: Path, name: str, case: str, overrides: list[str]) -> list[str]:
    """A run of two steps under root/name that saves after each."""
    long = data.train.parent / "long"
    options = [option.format(long=long) for option in CASES[case]]
    batch = ["train.global_batch_size=4", "train.micro_batch_size=2", f"data.sequence_length={LENGTH}"]
    ends = [f"train.tokens={STEPS * 4 * LENGTH}", "checkpoint.every_steps=1", "evaluation.sequences=3"]
    return [*data.overrides("stage=sft" in options), *options, *batch, *ends, *overrides, *place(root, name)]


def place(root: Path, name: str) -> list[str]:
    """Where a run lies."""
    return [f"run.root={root}", f"run.name={name}"]


def train_layouts(data: ToyData, root: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Runs of (layout, case), and of one process for each case among them."""
    pairs = list(pairs)
    cases = dict.fromkeys(case for _, case in pairs)
    train_many(1, [job(data, root, f"single_{case}", case, ["parallel=single"]) for case in cases], root, timeout=900)
    for num_ranks in (2, 4):
        jobs = [
            job(data, root, f"{layout}_{case}", case, LAYOUTS[layout][1])
            for layout, case in pairs
            if LAYOUTS[layout][0] == num_ranks
        ]
        train_many(num_ranks, jobs, root, timeout=1700)


@pytest.fixture(scope="module")
def root(data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("context")
    train_layouts(data, root, CHOSEN)
    return root


def assert_trains_alike(mine: Path, its: Path) -> None:
    """Losses and gradient norms within 1e-5, counts exactly; gradients of the first step; weights at the end."""
    for kind in ("train", "heldout"):
        for ours, theirs in zip(load_lines(mine, kind), load_lines(its, kind), strict=True):
            keys = [key for key in LOSSES if theirs[key] is not None] + (["grad_norm"] if kind == "train" else [])
            assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-5)
            assert all(ours[key] == theirs[key] for key in COUNTS if key in theirs)
    assert_close_tensors(mine, its, step=1, part="optimizer.state.exp_avg.", tolerance=1e-5)  # gradients, scaled
    assert_close_tensors(mine, its, step=STEPS, part="optimizer.state.param.", tolerance=1e-5)


def assert_close_tensors(mine: Path, its: Path, step: int, part: str, tolerance: float) -> None:
    """Every tensor of a checkpoint whose name begins so, by the norm of the difference."""
    ours, theirs = (load_tensors(run / "checkpoints" / f"step_{step:08d}") for run in (mine, its))
    names = [name for name in theirs if name.startswith(part)]
    assert len(names) == 4 * 6 + 3
    for name in names:
        assert (ours[name] - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


@pytest.mark.parametrize(("layout", "case"), CHOSEN)
def test_a_layout_trains_like_one_process(root: Path, layout: str, case: str) -> None:
    assert_trains_alike(root / f"{layout}_{case}", root / f"single_{case}")


def test_the_cases_hold_what_they_are_for(root: Path) -> None:
    joint, sft = (load_lines(root / f"single_{case}", "train") for case in ("joint_8", "sft_32"))
    assert all(line["completion_tokens"] > 0 for line in (*joint, *sft))
    assert all(line["filler_rows"] > 0 and line["context_tokens"] > 0 for line in sft)


@pytest.fixture(scope="module")
def resumed(root: Path, data: ToyData) -> Path:
    """Runs that made their first step in another layout."""
    jobs = []
    for name, (origin, layout) in RESUMED.items():
        shutil.copytree(root / f"{origin}_joint_8", root / name)
        shutil.rmtree(root / name / "checkpoints" / f"step_{STEPS:08d}")
        jobs.append(job(data, root, name, "joint_8", layout))
    train_many(2, jobs, root)
    return root


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_or_without_context_parallelism(resumed: Path, name: str) -> None:
    assert_trains_alike(resumed / name, resumed / "single_joint_8")
    assert load_lines(resumed / name, "restore")[0]["step"] == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_trains_like_one_process(data: ToyData, tmp_path: Path) -> None:
    train_layouts(data, tmp_path, OTHERS)
    for layout, case in OTHERS:
        assert_trains_alike(tmp_path / f"{layout}_{case}", tmp_path / f"single_{case}")
