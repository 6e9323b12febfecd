"""A model that reads images trains alike in every layout, and continues bit for bit."""

from pathlib import Path

import pytest

from conf.composition.compose import compose_run_config
from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from conf.system.errors import UserError
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.pictures import load_picture_questions, write_parquet
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from pretrain.resume.start_point import find_start
from pretrain.run.run_data import open_data
from tests.distributed.test_layouts import assert_same_curve
from tests.helpers.layouts import CP2, PP2, PP2_INTERLEAVED, TP2, TP2_PP2, TP2_SP, TP2_SP_CP2
from tests.helpers.processes import load_lines, train_many

LENGTH, STEPS, NUM_TRAIN, NUM_HELDOUT = 256, 4, 120, 16
VOCAB_SIZE = 384
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "pp2_interleaved": (2, PP2_INTERLEAVED),
    "cp2": (2, CP2),
    "dp2": (2, ()),
    "dp2_overlapped": (2, ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")),
    "tp2_pp2": (4, TP2_PP2),
    "tp2_sp_cp2": (4, TP2_SP_CP2),
}
RESUMED = ("single", "tower_frozen")
HALF = (f"train.tokens={STEPS // 2 * 8 * LENGTH}",)
SINGLE = {
    "single": (),
    "full_recompute": ("parallel.recompute=full",),
    "no_image_workers": ("data.image_workers=0", "data.prefetch_steps=0"),
    "autoregressive": ("stage.objective=ar",),
    "tower_frozen": ("stage.freeze=[tower]",),
    "text_frozen": ("stage.freeze=[text]",),
    "slow_tower": ("stage.tower_lr=1e-9", "stage.projector_lr=1e-9"),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides of a run on questions about pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    split = load_picture_questions(NUM_TRAIN, NUM_HELDOUT)
    texts = [f"{asked.question} {asked.response}" for asked in split.train]
    save_tokenizer(train_tokenizer(texts, VOCAB_SIZE, with_images=True), folder / "tokenizer")
    settings = PrepareConfig(workers=1, chat_template="chatml")
    for name, questions in (("train", split.train), ("heldout", split.heldout)):
        write_parquet(questions, folder / f"{name}.parquet")
        input_ = InputConfig(DocumentKind.image_chat, files=str(folder / f"{name}.parquet"), column="texts")
        source = SourceConfig(path=str(folder / name), input=input_)
        prepare_source(name, source, DataConfig(tokenizer=str(folder / "tokenizer"), prepare=settings))
    return [
        *("stage=vlm", "model=tiny_vlm", "precision=fp32", "runtime=cpu", "parallel=single"),
        *("runtime.progress_bar=false", "runtime.tensorboard=false"),
        *(f"data.train={folder / 'train'}", f"data.heldout={folder / 'heldout'}"),
        *(f"data.tokenizer={folder / 'tokenizer'}", f"data.sequence_length={LENGTH}", "stage.block_size=16"),
        *("train.global_batch_size=8", "train.micro_batch_size=2", f"train.tokens={STEPS * 8 * LENGTH}"),
        *("evaluation.sequences=3", "evaluation.every_steps=2"),
        # The same learning rate in every step, however long the run is.
        *("schedule.peak_lr=1e-3", "schedule.final_lr=1e-3", "schedule.warmup_fraction=0"),
    ]


def train(given: list[str], root: Path, num_ranks: int, variants: list[tuple[str, tuple[str, ...]]]) -> None:
    """Train runs of these names with these overrides in one set of processes; a name that comes again resumes."""
    jobs = [[*given, f"run.root={root}", f"run.name={name}", *extra] for name, extra in variants]
    train_many(num_ranks, jobs, root, timeout=500)


def list_layouts(num_ranks: int) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, extra) for name, (ranks, extra) in LAYOUTS.items() if ranks == num_ranks]


@pytest.fixture(scope="module")
def single_runs(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every variant in one process."""
    root = tmp_path_factory.mktemp("runs")
    halves = [(f"{name}_resumed", (*SINGLE[name], *extra)) for name in RESUMED for extra in (HALF, ())]
    train(given, root, 1, [*SINGLE.items(), *halves])
    return root


@pytest.fixture(scope="module")
def runs(given: list[str], single_runs: Path) -> Path:
    """Run folders of one and of two processes."""
    train(given, single_runs, 2, [*list_layouts(2), ("other_layout", (*TP2_SP, *HALF)), ("other_layout", PP2)])
    return single_runs


@pytest.mark.parametrize("name", ["full_recompute", "no_image_workers"])
def test_a_variant_in_one_process_trains_alike(single_runs: Path, name: str) -> None:
    assert_same_curve(single_runs / "single", single_runs / name)


@pytest.mark.parametrize("name", [*(name for name, _ in list_layouts(2)), "other_layout"])
def test_a_layout_trains_like_one_process(runs: Path, name: str) -> None:
    assert_same_curve(runs / "single", runs / name)


@pytest.mark.slow
def test_layouts_of_four_processes_train_like_one(given: list[str], single_runs: Path) -> None:
    train(given, single_runs, 4, list_layouts(4))
    for name, _ in list_layouts(4):
        assert_same_curve(single_runs / "single", single_runs / name)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_continues_bit_for_bit(single_runs: Path, name: str) -> None:
    def load(run: str) -> list[float]:
        return [line["loss"] for kind in ("train", "heldout") for line in load_lines(single_runs / run, kind)]

    whole, resumed = load(name), load(f"{name}_resumed")
    assert whole == resumed
    assert len(whole) == STEPS + 3


def test_other_parts_are_not_trained_after_a_resume(given: list[str], single_runs: Path) -> None:
    config = compose_run_config([*given, f"run.root={single_runs}", "run.name=tower_frozen"])
    with pytest.raises(UserError, match=r"stage\.freeze naming tower, now it names nothing"):
        find_start(config, open_data(config))


def test_what_is_compared_holds_images(runs: Path) -> None:
    lines = load_lines(runs / "single", "train")
    assert all(line["images"] > 16 and line["image_patches"] > 100 * 4 for line in lines)
    assert [line["images"] for line in lines] == [line["images"] for line in load_lines(runs / "tp2_sp", "train")]


def test_parts_can_be_frozen_or_slower(single_runs: Path) -> None:
    losses = {name: [line["loss"] for line in load_lines(single_runs / name, "train")] for name in SINGLE}
    assert losses["tower_frozen"][0] == losses["text_frozen"][0] == losses["single"][0]
    for name in ("tower_frozen", "text_frozen", "slow_tower"):
        assert losses[name][-1] != losses["single"][-1]
    assert losses["text_frozen"][-1] > losses["tower_frozen"][-1], "the text learns most in a few steps"


def test_images_are_refused_by_a_model_of_text(given: list[str]) -> None:
    config = compose_run_config([*given, "model=tiny", "run.name=text"])
    with pytest.raises(UserError, match="images, model=tiny reads none"):
        open_data(config)
