"""The table of recommended layouts holds what the planner found, and its keys give that layout."""

import pytest

from conf.composition.compose import compose_size
from conf.rules.run import check_rules
from launch.plan.hardware import Hardware
from launch.plan.plan import build_plan
from launch.plan.recommend import GPUS, SIZES, STAGES, build_table, compose_recipe, parallel_overrides, recommend
from tests.helpers.layouts import TP8_SP_CP4


def test_the_table_has_a_row_for_every_recipe_and_number_of_gpus() -> None:
    heading, rule, *rows = build_table()
    assert heading.startswith("| size | stage | H100 |") and set(rule) <= set("| -")
    assert len(rows) == len(SIZES) * len(STAGES) * len(GPUS)


@pytest.mark.parametrize(
    ("size", "stage", "num_gpus"), [("3b", "ar", 8), ("8b", "joint", 8), ("8b", "joint", 256), ("14b", "joint", 64)]
)
def test_the_overrides_of_a_row_give_its_prediction(size: str, stage: str, num_gpus: int) -> None:
    recipe = compose_recipe(size, stage)
    plan = recommend(recipe, num_gpus)
    assert plan is not None
    given = [
        f"experiment=nld_{size}_{stage}",
        *parallel_overrides(plan.config.parallel, recipe.parallel),
        f"parallel.recompute={plan.config.parallel.recompute.value}",
        f"train.micro_batch_size={plan.config.train.micro_batch_size}",
    ]
    config = compose_size(given)
    assert config.parallel == plan.config.parallel
    check_rules(config, num_gpus)
    again = build_plan(config, num_gpus, Hardware())
    assert again.fits
    assert (again.worst.total, again.time.total) == (plan.worst.total, plan.time.total)


def test_only_what_differs_from_the_recipe_is_to_be_given() -> None:
    parallel = compose_size(["experiment=nld_14b_sft", *TP8_SP_CP4]).parallel
    recipe = compose_recipe("14b", "sft").parallel
    assert parallel_overrides(parallel, recipe) == ["parallel.context_parallel=4"]
    assert parallel_overrides(compose_recipe("3b", "ar").parallel, recipe) == [
        "parallel.tensor_parallel=1",
        "parallel.sequence_parallel=false",
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
