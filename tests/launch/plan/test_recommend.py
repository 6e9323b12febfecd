"""The table of recommended layouts has what the search found, and its overrides give that layout."""

import pytest

from conf.composition.compose import compose_size
from conf.rules.run import check_rules
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.layout_plan import list_overrides, plan_layout
from launch.plan.recommend import COLUMNS, GPUS, SIZES, STAGES, build_table, recommend
from tests.helpers.layouts import TP8_SP_CP4


def test_the_command_prints_a_row_for_every_recipe_and_number_of_gpus() -> None:
    heading, rule, *table_rows = build_table()
    assert heading.startswith("| recipe | H100 | layout |") and set(rule) <= set("| -")
    assert len(table_rows) == len(SIZES) * len(STAGES) * len(GPUS)
    assert {row.count("|") for row in (heading, *table_rows)} == {len(COLUMNS) + 1}


@pytest.mark.parametrize(
    ("size", "stage", "num_gpus"), [("3b", "ar", 8), ("8b", "joint", 8), ("8b", "joint", 256), ("14b", "joint", 64)]
)
def test_the_overrides_of_a_row_give_its_prediction(size: str, stage: str, num_gpus: int) -> None:
    name = f"experiment=nld_{size}_{stage}"
    recipe = compose_size([name])
    plan = recommend(recipe, num_gpus)
    assert plan is not None
    config = compose_size([name, *list_overrides(plan.config, base=recipe)])
    assert config.parallel == plan.config.parallel
    check_rules(config, num_gpus)
    again = plan_layout(config, num_gpus, HardwareProfile())
    assert again.fits
    assert (again.fullest.total, again.time.total) == (plan.fullest.total, plan.time.total)


def test_overrides_are_all_keys_of_a_layout_or_its_differences_from_another() -> None:
    recipe = compose_size(["experiment=nld_14b_sft"])
    config = compose_size(["experiment=nld_14b_sft", *TP8_SP_CP4])
    assert list_overrides(config, base=recipe) == ["parallel.context_parallel=4"]
    assert list_overrides(recipe, base=recipe) == []
    assert compose_size(["experiment=nld_3b_sft", *list_overrides(config)]).parallel == config.parallel
    other = compose_size(["experiment=nld_3b_ar"])
    assert list_overrides(other, base=recipe)[:2] == [
        "parallel.tensor_parallel=1",
        "parallel.sequence_parallel=false",
    ]


def test_what_no_estimate_takes_into_account_is_named() -> None:
    plain = compose_size(["experiment=nld_8b_joint"])
    assert plan_layout(plain, 8, HardwareProfile()).not_modelled == []
    asked = compose_size(
        [
            "experiment=nld_8b_joint",
            "precision=fp8",
            "parallel.offload_layers=2",
            "parallel.overlap_tensor_parallel=true",
        ]
    )
    phrases = plan_layout(asked, 8, HardwareProfile()).not_modelled
    assert [phrase.split(":")[0] for phrase in phrases] == [
        "precision.fp8",
        "parallel.offload_layers",
        "parallel.overlap_tensor_parallel",
    ]
