"""The list of cases has the shapes of the recipes, and names each of them once."""

from dataclasses import astuple
from pathlib import Path

import pytest

from conf.composition.compose import compose_size
from tests.kernels.attention_cases import BLOCK_SIZE, HEAD_DIM
from tests.kernels.cases import SFT_SHAPES, SHAPES, find_case, list_large_cases, list_small_cases

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("nld_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_shape(recipe: str) -> None:
    config = compose_size([f"experiment={recipe}"])
    model, ranks = config.model, config.parallel.tensor_parallel
    shapes = {astuple(shape)[1:5] for shape in (SFT_SHAPES if config.stage.chats_only else SHAPES)}
    heads = (model.num_attention_heads // ranks, model.num_key_value_heads // ranks)
    assert (config.data.sequence_length, *heads, model.ffn_hidden_size // ranks) in shapes
    assert (model.head_dim, config.stage.block_size, config.train.micro_batch_size) == (HEAD_DIM, BLOCK_SIZE, 1)


def test_all_recipes_are_there() -> None:
    assert len(RECIPES) == 12


def test_every_case_has_a_name_of_its_own_and_is_found_by_it() -> None:
    cases = [*list_large_cases(), *list_small_cases()]
    assert len({case.name for case in cases}) == len(cases)
    assert all(find_case(case.name) == (case, case.name.endswith("/small")) for case in cases)
