"""The README's table of layouts is what the planner says, and its layouts are what the planner found."""

from pathlib import Path

import pytest

from conf.composition.compose import compose_size
from conf.rules.run import check_rules
from launch.plan.hardware import Hardware
from launch.plan.plan import build_plan
from launch.plan.recommend import build_table, parallel_overrides, recommend

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_what_the_command_prints() -> None:
    assert "\n".join(build_table()) in README


@pytest.mark.parametrize(
    ("size", "stage", "num_gpus"), [("3b", "ar", 8), ("8b", "joint", 8), ("8b", "joint", 256), ("14b", "joint", 64)]
)
def test_the_overrides_of_a_row_give_its_prediction(size: str, stage: str, num_gpus: int) -> None:
    plan = recommend(size, stage, num_gpus)
    assert plan is not None
    given = [
        f"experiment=nld_{size}_{stage}",
        *parallel_overrides(plan.config.parallel),
        f"parallel.recompute={plan.config.parallel.recompute.value}",
        f"train.micro_batch_size={plan.config.train.micro_batch_size}",
    ]
    config = compose_size(given)
    assert config.parallel == plan.config.parallel
    check_rules(config, num_gpus)
    again = build_plan(config, num_gpus, Hardware())
    assert again.fits
    assert (again.worst.total, again.time.total) == (plan.worst.total, plan.time.total)


def test_a_degree_without_an_option_of_its_own_is_a_key() -> None:
    parallel = compose_size(["experiment=nld_14b_sft", "parallel=tp8_sp_cp4"]).parallel
    assert parallel_overrides(parallel) == [
        "parallel=h100_tp4",
        "parallel.tensor_parallel=8",
        "parallel.context_parallel=4",
    ]


def test_what_no_estimate_knows_of_is_said() -> None:
    plain = compose_size(["experiment=nld_8b_joint"])
    assert build_plan(plain, 8, Hardware()).not_modelled == []
    asked = compose_size(
        [
            "experiment=nld_8b_joint",
            "precision=fp8",
            "parallel.offload_layers=2",
            "parallel.overlap_tensor_parallel=true",
        ]
    )
    phrases = build_plan(asked, 8, Hardware()).not_modelled
    assert [phrase.split(":")[0] for phrase in phrases] == [
        "precision.fp8",
        "parallel.offload_layers",
        "parallel.overlap_tensor_parallel",
    ]
