"""Settings of the vision tower and of the parts that a stage trains are checked before a run."""

import pytest

from conf.composition.compose import compose_run_config
from conf.rules.run import check_rules
from conf.system.errors import ConfigError

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=1e6"]
TOWER = "model=tiny_vlm"
WRONG = {
    "no_tower_to_freeze": (["stage.freeze=[tower]"], "stage.freeze names tower, and model.vision is null"),
    "no_projector_to_slow_down": (["stage.projector_lr=0.5"], "stage.projector_lr=0.5 has no effect"),
    "nothing_to_train": ([TOWER, "stage.freeze=[text,tower,projector]"], "leaves nothing to train"),
    "text_alone_frozen": (["stage.freeze=[text]"], "leaves nothing to train"),
    "other_features": ([TOWER, "model.vision.patch_size=16"], "must be 28"),
    "heads": ([TOWER, "model.vision.num_attention_heads=3"], "a multiple of 4"),
    "tf32_for_all": (["precision=fp32", "precision.vision=tf32"], "would round the matmuls of the whole model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_one_message(name: str) -> None:
    overrides, message = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        check_rules(compose_run_config([*GIVEN, *overrides]), world_size=1)
    assert message in str(caught.value)


def test_parts_may_be_frozen_and_slower() -> None:
    given = [TOWER, "stage=vlm", "data.sequence_length=4096", "stage.freeze=[text,tower]", "stage.projector_lr=2"]
    check_rules(compose_run_config([*GIVEN, *given]), world_size=1)
