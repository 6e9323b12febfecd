"""Every layout trains the same model: losses of every stage against one process, and the noise bit for bit.

That one process computes every noisy block; all others leave out those that are not live.
"""

import json
from pathlib import Path

import pytest

from tests.helpers.layouts import PP2, PP2_INTERLEAVED, TP2, TP2_PP2, TP2_SP
from tests.helpers.processes import load_lines, train_many
from tests.helpers.toy_data import ToyData, tokens_of
from tests.helpers.train_jobs import REHEARSED, WHOLE

STAGES = ("ar", "joint", "sft")
SMALL_BLOCKS = "stage.block_size=4"  # in the joint stage: of larger ones nearly all are live
STEPS = 10
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2_SP),
    "tp2_sp_elementwise": (2, [*TP2_SP, "parallel.recompute=elementwise"]),
    "pp2_loss_on_the_last_stage_only": (2, PP2),
    "pp2_interleaved": (2, PP2_INTERLEAVED),
    "pp2_interleaved_overlapped": (2, [*PP2_INTERLEAVED, "parallel.overlap_pipeline=true"]),
    "dp2_distributed_optimizer": (2, ["parallel=single"]),
    "dp2_overlapped_in_small_buckets": (
        2,
        [
            "parallel=single",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            "parallel.bucket_parameters=20000",
        ],
    ),
    "tp2_pp2": (4, TP2_PP2),
}
SINGLE = {
    "single": ["parallel=single", WHOLE],
    "live_blocks": ["parallel=single"],
    "micro_batch_1": ["parallel=single", "train.micro_batch_size=1"],
    "selective_recompute": ["parallel=single", "parallel.recompute=selective"],
    "full_recompute": ["parallel=single", "parallel.recompute=full"],
    "small_loss_chunks": ["parallel=single", "runtime.loss_chunk_rows=7"],
}


def job(data: ToyData, root: Path, name: str, stage: str, overrides: list[str]) -> list[str]:
    """Return the overrides of one run under root/name_stage."""
    where = [f"run.root={root}", f"run.name={name}_{stage}", f"stage={stage}"]
    chats, blocks = stage == "sft", [SMALL_BLOCKS] if stage == "joint" else []
    return [*data.overrides(chats), *where, *blocks, tokens_of(STEPS, chats), *overrides]


@pytest.fixture(scope="module")
def runs(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of one process, in every variant that needs no second one."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [job(toy_data, root, name, stage, extra) for name, extra in SINGLE.items() for stage in STAGES]
    train_many(1, jobs, root)
    return root


LOSSES = ("loss", "ar_loss", "diffusion_loss", "masked_ce")


def assert_same_curve(expected: Path, actual: Path, kinds: tuple[str, ...] = ("train", "heldout")) -> None:
    """Compare losses and held-out losses within 1e-5 relative; gradient norms too in the first steps.

    Later norms may differ more: Adam divides gradients near zero by their own size, which blows rounding up.
    """
    for kind in kinds:
        ours, theirs = load_lines(actual, kind), load_lines(expected, kind)
        assert len(ours) == len(theirs) > 2
        for mine, its in zip(ours, theirs, strict=True):
            shared = [key for key in LOSSES if its[key] is not None]
            assert [mine[key] for key in shared] == pytest.approx([its[key] for key in shared], rel=1e-5)
            if kind == "train" and mine["step"] <= 3:
                assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-5)


def load_noise(run_dir: Path) -> dict[str, str]:
    """Load the noise digests of all ranks; ranks that drew the same sample must agree."""
    merged: dict[str, str] = {}
    for path in run_dir.glob("noise_rank*.json"):
        for key, digest in json.loads(path.read_text(encoding="utf-8")).items():
            assert merged.setdefault(key, digest) == digest
    return merged


@pytest.mark.parametrize("name", [name for name in SINGLE if name != "single"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_variant_in_one_process_trains_alike(runs: Path, name: str, stage: str) -> None:
    assert_same_curve(runs / f"single_{stage}", runs / f"{name}_{stage}")


@pytest.fixture(scope="module")
def layouts(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every layout, those of as many ranks in the same processes."""
    root = tmp_path_factory.mktemp("layouts")
    for num_ranks in sorted({ranks for ranks, _ in LAYOUTS.values()}):
        mine = {name: overrides for name, (ranks, overrides) in LAYOUTS.items() if ranks == num_ranks}
        jobs = [
            job(toy_data, root, name, stage, [*extra, *([] if stage == "ar" else [REHEARSED])])
            for name, extra in mine.items()
            for stage in STAGES
        ]
        train_many(num_ranks, jobs, root, timeout=500)
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_like_one_process(runs: Path, layouts: Path, name: str) -> None:
    for stage in STAGES:
        assert_same_curve(runs / f"single_{stage}", layouts / f"{name}_{stage}")
    for stage in ("joint", "sft"):
        noise = load_noise(layouts / f"{name}_{stage}")
        assert noise == load_noise(runs / f"single_{stage}")
        assert len(noise) == STEPS * 8 + 6


def test_what_is_compared_has_forwards_of_several_lengths(runs: Path) -> None:
    found = {
        (name, stage): sorted(map(int, json.loads((runs / f"{name}_{stage}" / "lengths_rank0.json").read_text())))
        for name in ("single", "live_blocks")
        for stage in ("joint", "sft")
    }
    assert found["single", "joint"] == [64]
    assert found["single", "sft"] == [192]
    assert found["live_blocks", "joint"][-1] == 64 > found["live_blocks", "joint"][0]
    assert 2 <= len(found["live_blocks", "sft"]) <= 8
    assert found["live_blocks", "sft"][-1] < 192


def test_ranks_share_the_work_of_a_step_evenly(layouts: Path) -> None:
    """So few short chats are even as they come; tests/data_pipeline/test_dealing.py has uneven ones."""
    lines = load_lines(layouts / "dp2_distributed_optimizer_sft", "train")
    assert all(1 <= line["rank_imbalance"] < 1.1 for line in lines)
    assert all(line["undealt_rank_imbalance"] >= 1 for line in lines)
    assert all(1 <= line["noisy_lengths"] <= 8 for line in lines)


def test_training_lowers_both_losses(runs: Path) -> None:
    first, *_, last = load_lines(runs / "single_joint", "heldout")
    assert last["ar_loss"] < first["ar_loss"] - 0.5
    assert last["diffusion_loss"] < first["diffusion_loss"] - 0.5
