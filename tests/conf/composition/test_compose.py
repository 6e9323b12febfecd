"""Composition is strict: what is not in the schema is refused, with the nearest valid spelling."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.composition.compose import compose_layout, compose_run_config, compose_size, load_run_config
from conf.schema import Objective, ResumeMode, RunConfig
from conf.system.errors import ConfigError, UserError
from tests.helpers.layouts import TP2, TP4

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=300e9"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run_config([*GIVEN, *overrides])
    return str(caught.value)


def test_the_documented_command_line_composes() -> None:
    config = compose_run_config(["stage=joint", "model=ministral3_8b", *TP4, *GIVEN])
    assert isinstance(config, RunConfig)
    assert config.stage.objective is Objective.joint
    assert (config.model.num_layers, config.parallel.tensor_parallel) == (34, 4)
    assert config.train.tokens == 300e9
    assert config.run.dir == "runs/ministral3_8b_joint"


def test_an_override_on_the_command_line_beats_the_experiment() -> None:
    config = compose_run_config([*GIVEN, "experiment=nld_8b_joint", *TP2, "schedule.peak_lr=5e-6"])
    assert (config.parallel.tensor_parallel, config.parallel.sequence_parallel) == (2, True)
    assert (config.schedule.peak_lr, config.schedule.final_lr) == (5e-6, 3e-6)


def test_a_layout_that_a_recipe_would_hide_is_refused_with_the_keys_to_give() -> None:
    message = refusal("experiment=nld_8b_joint", "parallel=single")
    assert message.endswith("give instead: parallel.tensor_parallel=1 parallel.sequence_parallel=false")
    keys = ["parallel.tensor_parallel=1", "parallel.sequence_parallel=false"]
    assert (
        compose_run_config([*GIVEN, "experiment=nld_8b_joint", "parallel=single", *keys]).parallel.model_parallel == 1
    )
    assert compose_run_config([*GIVEN, "experiment=nld_8b_joint", "parallel=h100"]).parallel.model_parallel == 4


def test_resume_is_a_group_and_a_key() -> None:
    config = compose_run_config([*GIVEN, "resume=never", "resume.allow_data_change=true"])
    assert (config.resume.mode, config.resume.allow_data_change) == (ResumeMode.never, True)


def test_config_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError) and issubclass(UserError, ValueError)


def test_everything_missing_is_listed_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"data\.train=.* data\.tokenizer=.* train\.tokens="):
        compose_run_config([])


@pytest.mark.parametrize(
    ("override", "named", "suggested"),
    [
        ("train.tokns=1", "'train.tokns'", "'train.tokens'"),
        ("trian.tokens=1", "'trian.tokens'", "'train.tokens'"),
        ("peak_lr=1", "'peak_lr'", "'schedule.peak_lr'"),
        ("modle=tiny", "'modle'", "'model'"),
        ("++model.rope.fctor=1", "'model.rope.fctor'", "'model.rope.factor'"),
        ("+stage.lrr=1", "'stage.lrr'", "keys of stage: name, objective, chats_only"),
        ("+x=1", "'x'", "--help"),
        ("model=ministral_8b", "model=ministral_8b", "model=ministral3_8b"),
        ("experiment=nld_8b", "experiment=nld_8b", "experiment=nld_8b_ar"),
        ("stage=pretraining", "stage=pretraining", "ar, joint"),
    ],
)
def test_an_unknown_key_or_option_is_named_with_the_nearest_one(override: str, named: str, suggested: str) -> None:
    message = refusal(override)
    assert named in message and suggested in message


def test_several_unknown_keys_are_named_together() -> None:
    message = refusal("+stage.lrr=1", "+trainer.gpus=8")
    assert "stage.lrr" in message and "trainer.gpus" in message


@pytest.mark.parametrize(
    ("override", "named", "reason"),
    [
        ("train.tokens=many", "train.tokens", "could not be converted to Float"),
        ("train.seed=1.5", "train.seed", "could not be converted to Integer"),
        ("precision.dtype=fp16", "precision.dtype", "expected one of [bf16, fp32]"),
        ("data.train=null", "data.train", "give the path"),
        ("train=3", "train", "not a subclass of TrainConfig"),
        ("data.train=${corpus}", "data.train", "'corpus' not found"),
        ("model=3", "group=option", "must be a string"),
        ("stage", "'stage'", "key=value"),
    ],
)
def test_a_wrong_value_is_reported_with_its_key_and_reason(override: str, named: str, reason: str) -> None:
    message = refusal(override)
    assert named in message and reason in message
    assert "\n" not in message


def test_a_configuration_survives_being_written_and_read(tmp_path: Path) -> None:
    config = compose_run_config([*GIVEN, "experiment=nld_14b_joint", "train.seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
    assert load_run_config(path) == config


@pytest.mark.parametrize("text", ["- a list", "{unbalanced", "stage: {nme: ar}"])
def test_a_damaged_or_foreign_config_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_run_config(path)


def test_an_absent_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_run_config(tmp_path / "absent.yaml")


def test_a_layout_composes_outside_a_run() -> None:
    layout = compose_layout(["tensor_parallel=2", "parallel.pipeline_parallel=2"])
    assert (layout.tensor_parallel, layout.pipeline_parallel) == (2, 2)
    assert compose_layout(["h100"]).overlap_grad_reduce
    with pytest.raises(ConfigError, match=r"did you mean parallel=single"):
        compose_layout(["singel"])
    with pytest.raises(ConfigError, match=r"did you mean 'parallel\.tensor_parallel'"):
        compose_layout(["tensor_paralel=2"])


def test_a_recipe_needs_no_data_to_have_a_size() -> None:
    config = compose_size(["experiment=nld_8b_sft", "train.micro_batch_size=2"])
    assert (config.data.sequence_length, config.train.micro_batch_size) == (16384, 2)
    with pytest.raises(ConfigError, match=r"data\.train"):
        compose_run_config(["experiment=nld_8b_sft"])


def test_what_decides_the_size_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens"):
        compose_size(["model=tiny", "stage=joint"])


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel"):
        compose_size(["experiment=nld_8b_ar", "parallel.tensor_paralel=2"])
