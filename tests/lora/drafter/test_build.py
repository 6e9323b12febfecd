"""A whole training from prompts alone, on one process; and what becomes of the others when the first one fails."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.composition.compose import compose_drafter_config
from conf.system.errors import UserError
from data_pipeline.toy.corpus import write_jsonl
from lora.drafter.build import check_lengths, check_rank
from lora.drafter.engine import build_deepspeed_config
from model.export.adapter_weights import WEIGHTS_FILE
from tests.helpers.processes import ROOT, kill_tree, load_lines, rank_environment, run_ranks, torchrun, train_many
from tests.helpers.tiny_exports import make_tiny_model, save_tiny_export

STEPS, NUM_PROMPTS = 2, 12
# Marks no responses, as those of many released checkpoints: it can render prompts, not given responses.
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Write a folder with an export and prompts of all three kinds."""
    export = save_tiny_export(tmp_path / "export")
    (export / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    records: list[dict[str, Any]] = []
    for number in range(NUM_PROMPTS // 3):
        records += [
            {"messages": [{"role": "user", "content": f"Why {number}?"}]},
            {"prompt": f"The sea {number}"},
            {"text": f"{number} ships go out every day."},
        ]
    write_jsonl(records, tmp_path / "prompts.jsonl")
    return tmp_path


def overrides(start: Path, *extra: str) -> list[str]:
    return [
        f"checkpoint={start}/export",
        f"data={start}/prompts.jsonl",
        f"output={start}/adapter",
        f"run.dir={start}/run",
        "responses.prompt_tokens=8",
        "responses.max_new_tokens=12",
        "responses.prompts_per_shard=4",
        "adapter.rank=4",
        f"train.steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.sequence_length=64",
        "train.blocks_per_sequence=6",
        "evaluation.share=0.2",
        "runtime.dtype=fp32",
        "runtime.device=cpu",
        "runtime.progress_bar=false",
        "runtime.tensorboard=false",
        *extra,
    ]


@pytest.mark.parametrize(
    ("block_size", "max_positions", "message"),
    [
        (8, 70, r"exceed the 70 positions .* give train.sequence_length=62"),
        (64, 512, "does not fit"),
        (1, 512, "not fit"),
    ],
)
def test_sequences_must_fit_the_model_and_blocks_the_sequences(
    start: Path, block_size: int, max_positions: int, message: str
) -> None:
    config = compose_drafter_config(overrides(start))
    check_lengths(config, 8, 72)
    with pytest.raises(UserError, match=message):
        check_lengths(config, block_size, max_positions)


def test_a_rank_above_that_of_o_proj_is_refused(start: Path) -> None:
    config = compose_drafter_config([*overrides(start), "adapter.rank=25"])
    with pytest.raises(UserError, match="give at most 24"):
        check_rank(config, make_tiny_model().config)


def test_a_drafter_trains_on_responses_to_prompts_alone(start: Path) -> None:
    train_many(1, [overrides(start, "responses.source=greedy")] * 2, start, "tests.helpers.drafter_jobs")
    run_dir = start / "run"
    assert [line["step"] for line in load_lines(run_dir, "train")] == [1, 2]
    assert [line["step"] for line in load_lines(run_dir, "heldout")] == [0, 2]
    assert all(line["blocks"] > 0 for line in load_lines(run_dir, "train"))
    log = next(run_dir.glob("*.log")).read_text(encoding="utf-8")
    assert f"{NUM_PROMPTS} prompts" in log and "nothing was left to do" in log
    assert len(list((run_dir / "answers").iterdir())) == 2  # of those trained on and of those held out
    assert not (run_dir / "data").exists()  # nothing is tokenised beforehand
    adapter = load_file(start / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for key, value in adapter.items() if "lora_B" in key)


def test_optimizer_and_schedule_are_those_of_the_configuration(start: Path) -> None:
    optimizer = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6, "weight_decay": 0.3, "clip_norm": 0.25}
    schedule = {"kind": "wsd", "peak_lr": 1e-2, "final_lr": 1e-3, "warmup_fraction": 0, "decay_fraction": 0.5}
    keys = {f"optimizer.{key}": value for key, value in optimizer.items()}
    keys |= {f"schedule.{key}": value for key, value in schedule.items()}
    arguments = overrides(start, "responses.source=greedy", "zero.stage=0", "train.steps=4")
    arguments += [f"{key}={value}" for key, value in keys.items()]
    train_many(1, [arguments], start, "tests.helpers.drafter_jobs")
    rates = [line["lr"] for line in load_lines(start / "run", "train")]
    assert rates == pytest.approx([1e-2, 1e-2, 5.5e-3, 1e-3])
    saved = torch.load(start / "run/checkpoints/step_00000004/deepspeed/mp_rank_00_model_states.pt", weights_only=False)
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
    assert group["lr"] == pytest.approx(1e-3)
    assert build_deepspeed_config(compose_drafter_config(arguments), 1)["gradient_clipping"] == 0.25


def test_the_failure_of_the_first_process_is_printed_once_and_ends_the_others(start: Path) -> None:
    """It alone reads the records, and finds no responses."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        torchrun(2, "lora.train", *overrides(start)), env=rank_environment(), cwd=ROOT, stderr=pipe, text=True
    ) as process:
        try:
            _, printed = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            raise
    assert process.returncode != 0
    assert printed.count("error: ") == 1 and "holds prompts without responses: set responses.source=greedy" in printed
    assert "[rank1]" not in printed  # where the traceback of a broken collective begins


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_bf16_model_trains_on_a_gpu(start: Path, zero_stage: int) -> None:
    given = ["runtime.device=cuda", "runtime.dtype=bf16", f"zero.stage={zero_stage}", "responses.source=greedy"]
    run_ranks(1, "lora.train", *overrides(start, *given))
    assert [line["step"] for line in load_lines(start / "run", "train")] == [1, 2]
    assert all(weight.isfinite().all() for weight in load_file(start / "adapter" / WEIGHTS_FILE).values())
