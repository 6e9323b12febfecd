"""The recipes carry the published numbers, state each of them in YAML and say where it is from."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf.composition.compose import compose_run_config
from conf.composition.trees import RUN_TREE
from conf.rules.run import check_rules
from conf.schema import Objective, RunConfig

RECIPES = [option for option in RUN_TREE.options("experiment") if option.startswith("nld_")]
# What the report's training table gives (arXiv 2607.05722, section 5.1): for every stage, and for those with noise.
OF_EVERY_STAGE = {
    *("stage.objective", "stage.block_size", "data.sequence_length", "precision.dtype", "parallel.tensor_parallel"),
    *("train.tokens", "train.global_batch_size", "train.micro_batch_size", "train.seed"),
    *("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon", "optimizer.weight_decay", "optimizer.clip_norm"),
    *("schedule.kind", "schedule.peak_lr", "schedule.final_lr"),
    *("schedule.warmup_fraction", "schedule.decay_fraction", "schedule.decay_shape"),
}
OF_NOISE = {"stage.diffusion_weight", "stage.noise_epsilon", "stage.loss_normalization"}


@cache
def compose_recipe(name: str) -> RunConfig:
    given = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer"]
    return compose_run_config([f"experiment={name}", *given, *(["init_from=weights"] if name.endswith("_ar") else [])])


def recipe_files(name: str) -> list[Path]:
    """Return the recipe's own file and its stage's."""
    return [RUN_TREE.folder / "experiment" / f"{file}.yaml" for file in (name, f"nld/{stage_of(name)}")]


def stage_of(name: str) -> str:
    return name.rpartition("_")[2]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_carry_the_published_training_numbers(name: str) -> None:
    config = compose_recipe(name)
    _, size, stage = name.split("_")
    is_tuning = stage in ("sft", "vlm")  # the last takes instruct tuning's numbers, for its own are not published
    assert config.model.name == f"ministral3_{size}" + ("_vlm" if stage == "vlm" else "")
    assert config.stage.name == stage
    assert config.stage.objective is (Objective.ar if stage == "ar" else Objective.joint)
    assert config.train.tokens == {"ar": 1e12, "joint": 300e9, "sft": 45e9, "vlm": 45e9}[stage]
    shape, rates = ((16384, 256), (2.5e-6, 2.5e-7)) if is_tuning else ((4096, 512), (1e-5, 3e-6))
    assert (config.data.sequence_length, config.train.global_batch_size) == shape
    assert (config.schedule.peak_lr, config.schedule.final_lr) == rates
    assert (config.schedule.kind.value, config.schedule.warmup_fraction) == ("wsd", 0.01)
    degrees = {"3b": 4, "8b": 8, "14b": 8} if is_tuning else {"3b": 1, "8b": 4, "14b": 8}  # of SFT: what fits
    assert config.parallel.tensor_parallel == degrees[size]
    assert config.precision.dtype.value == "bf16"
    assert config.stage.diffusion_weight == 0.3
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_state_every_number_in_yaml(name: str) -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in recipe_files(name))
    options = [f"stage/{stage_of(name)}", "schedule/wsd", "precision/bf16"]
    for option in options:
        assert f"  - override /{option.replace('/', ': ')}" in text
    files = [*recipe_files(name), *(RUN_TREE.folder / f"{option}.yaml" for option in options)]
    claimed = OF_EVERY_STAGE | (set() if stage_of(name) == "ar" else OF_NOISE)
    assert claimed <= {key for file in files for key in keys_of(file)}


def keys_of(file: Path) -> Iterator[str]:
    """Yield the dotted keys that an option's file gives."""
    is_global = "@package _global_" in file.read_text(encoding="utf-8")
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[assignment]
    for name, value in values.items() if is_global else [(file.parent.name, values)]:
        yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) else [name]


@pytest.mark.parametrize(
    "file", sorted({file for name in RECIPES for file in recipe_files(name)}), ids=lambda f: f.stem
)
def test_every_number_says_where_it_is_from(file: Path) -> None:
    settings = re.findall(r"^  \w+: .*$", file.read_text(encoding="utf-8").partition("\nrun:")[0], re.MULTILINE)
    assert len(settings) >= 1
    for line in settings:
        assert re.search(r" # \[(report|released|inferred)\]", line), line


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_256_gpus(name: str) -> None:
    check_rules(compose_recipe(name), world_size=256)


@pytest.mark.parametrize("size", ["3b", "8b", "14b"])
def test_every_recipe_starts_where_the_one_before_ends(size: str) -> None:
    # What `make convert-checkpoint VISION=...` wrote.
    vlm = compose_recipe(f"nld_{size}_vlm")
    assert vlm.init_from == f"runs/nld_{size}_vlm_start" and not vlm.stage.freeze
    ar, joint, sft = (compose_recipe(f"nld_{size}_{stage}") for stage in ("ar", "joint", "sft"))
    assert (joint.init_from, sft.init_from) == (ar.run.dir, joint.run.dir)
