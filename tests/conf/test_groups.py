"""Every YAML file of conf/ composes, fits the schema and obeys the rules: sizes, stages, layouts, data."""

import itertools
import re
from functools import cache

import pytest

from conf.composition.compose import compose_groups, compose_run_config
from conf.composition.help import describe_option
from conf.composition.trees import DRAFTER_TREE, RUN_TREE
from conf.rules.run import check_rules
from conf.schema import RunConfig
from tests.helpers.data_options import complete_data

DATA = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer"]
GIVEN = [*DATA, "train.tokens=1e9"]
OPTIONS = [(group, option) for group in RUN_TREE.groups for option in RUN_TREE.options(group)]

# name: hidden, ffn, layers, heads, kv heads, head_dim, rope theta (FACTS.md section 1)
RELEASED_SIZES = {
    "ministral3_3b": (3072, 9216, 26, 32, 8, 128, 1e6),
    "ministral3_8b": (4096, 14336, 34, 32, 8, 128, 1e6),
    "ministral3_14b": (5120, 16384, 40, 32, 8, 128, 1e9),
}


@cache
def compose_option(group: str, option: str) -> RunConfig:
    """Compose a run that uses one option, with a large enough model and whatever the option leaves open."""
    overrides = {"model": "ministral3_8b", group: option}
    given = list(DATA if group != "data" else complete_data(option))
    if group != "experiment":
        given.append("train.tokens=1e9")
    elif option.endswith("_ar"):
        given.append("init_from=weights")
    if group in ("experiment", "model"):
        overrides = {group: option}
    if group == "parallel":
        given.append("model.num_layers=32")  # 34 layers do not make four chunks
    return compose_run_config([f"{name}={value}" for name, value in overrides.items()] + given)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_file_composes_and_obeys_the_rules(group: str, option: str) -> None:
    config = compose_option(group, option)
    check_rules(config, world_size=config.parallel.model_parallel)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_file_says_in_a_comment_what_it_is(group: str, option: str) -> None:
    assert describe_option(RUN_TREE, group, option).endswith(".")


def test_every_group_is_in_the_defaults_list() -> None:
    composed = compose_groups([])
    chosen = {"stage", "model", "data", "parallel", "schedule", "precision", "runtime", "resume"}
    assert set(RUN_TREE.groups) == chosen | {"experiment"}
    assert chosen | {"experiment"} <= set(composed)


@pytest.mark.parametrize("name", RELEASED_SIZES)
def test_released_sizes_have_the_numbers_of_the_released_checkpoints(name: str) -> None:
    model = compose_option("model", name).model
    found = (
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.rope.theta,
    )
    assert found == RELEASED_SIZES[name]
    assert (model.name, model.vocab_size, model.rms_norm_eps) == (name, 131072, 1e-5)
    assert model.max_position_embeddings == 262144
    rope = model.rope
    assert (rope.factor, rope.original_max_position_embeddings) == (16.0, 16384)
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)
    assert (rope.truncate, rope.llama_4_scaling_beta) == (True, 0.1)


def test_the_quickstart_stages_share_data_and_model_and_chain() -> None:
    ar, joint = (compose_run_config([f"experiment=quickstart_{stage}"]) for stage in ("ar", "joint"))
    assert (ar.data, ar.model) == (joint.data, joint.model)
    assert joint.init_from == ar.run.dir
    assert (ar.parallel.tensor_parallel, joint.parallel.pipeline_parallel) == (2, 2)


@pytest.mark.parametrize("name", RUN_TREE.options("experiment"))
def test_an_experiment_records_its_own_name(name: str) -> None:
    assert compose_groups([f"experiment={name}"]).experiment == name


def test_the_documented_groups_and_options_are_those_that_exist() -> None:
    text = (RUN_TREE.folder / "README.md").read_text(encoding="utf-8")
    tables = text.split("`drafter/` is a tree of its own")  # first the groups of a run, then those of a drafter
    for tree, table in zip((RUN_TREE, DRAFTER_TREE), tables, strict=True):
        table_rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", table, re.MULTILINE))
        assert set(table_rows) == set(tree.groups)
        for group, options in table_rows.items():
            listed = {option for pattern in re.findall(r"`([^`]+)`", options) for option in expand_braces(pattern)}
            assert listed == set(tree.options(group)), group


def expand_braces(pattern: str) -> list[str]:
    """Return the names a shell would make of a{b,c}d{e,f}."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]
