"""Overlap, offload and 8-bit matmuls: what cannot work together is refused before anything starts."""

import pytest

from conf.composition.compose import compose_run_config
from conf.rules.run import check_rules
from conf.system.errors import ConfigError
from tests.helpers.layouts import H100, H100_TP2, H100_TP4, PP2, PP2_INTERLEAVED, TP4, TP4_SP, TP8_SP, TP8_SP_CP4

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=1e9", "model=ministral3_8b"]
SPLIT = H100_TP4
OVERLAP = "parallel.overlap_tensor_parallel=true"
OFFLOAD = "parallel.offload_layers=4"
FP8 = "precision=fp8"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([*TP4, OVERLAP], ["parallel.sequence_parallel=true"]),
        ([*SPLIT, OVERLAP, "runtime=cpu"], ["runtime.device=cpu", "runtime.device=auto"]),
        ([*SPLIT, OVERLAP, "precision=fp8_blockwise"], ["precision.fp8=blockwise", "precision.fp8=tensorwise"]),
        ([*PP2, "parallel.overlap_pipeline=true"], ["parallel.virtual_pipeline_parallel of 2"]),
        (["parallel.offload_layers=34"], ["parallel.offload_layers=34", "model.num_layers=34"]),
        ([*PP2, OFFLOAD], ["parallel.pipeline_parallel=2", "parallel.recompute"]),
        ([OFFLOAD, "parallel.recompute=selective"], ["parallel.recompute=none"]),
        ([OFFLOAD, "parallel.recompute=elementwise"], ["parallel.recompute=none"]),
        ([OFFLOAD, "runtime=cpu"], ["runtime.device=cpu"]),
        ([FP8, "precision.dtype=fp32"], ["precision.dtype=bf16"]),
        ([FP8, "runtime=cpu"], ["precision.fp8=tensorwise", "runtime.device=cpu"]),
        ([FP8, "parallel.recompute=elementwise"], ["precision.fp8=tensorwise", "parallel.recompute=none"]),
        ([FP8, "model.hidden_size=4088"], ["multiples of 16", "model.hidden_size=4088"]),
        ([*SPLIT, FP8, "model.ffn_hidden_size=14368"], ["model.ffn_hidden_size=14368 / ", "= 3592"]),
        ([FP8, "data.sequence_length=4104", "stage.block_size=8"], ["positions of a rank", "= 4104"]),
        (["precision=fp8_blockwise", "model.hidden_size=4160"], ["multiples of 128", "model.hidden_size=4160"]),
    ],
)
def test_a_violated_rule_names_the_keys_the_values_and_a_remedy(overrides: list[str], named: list[str]) -> None:
    config = compose_run_config([*GIVEN, *overrides])
    with pytest.raises(ConfigError) as caught:
        check_rules(config, config.parallel.model_parallel)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*SPLIT, OVERLAP],
        [*SPLIT, OVERLAP, FP8],
        [*SPLIT, OFFLOAD],
        [*TP8_SP_CP4, "precision=fp8_blockwise", "stage=joint"],
        [*PP2_INTERLEAVED, "parallel.overlap_pipeline=true", "model.num_layers=32"],
        [FP8, "parallel.recompute=full"],
        [*SPLIT, OVERLAP, "parallel.recompute=elementwise"],
    ],
)
def test_what_works_together_is_let_through(overrides: list[str]) -> None:
    config = compose_run_config([*GIVEN, *overrides])
    check_rules(config, config.parallel.model_parallel)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("model", ["ministral3_3b", "ministral3_8b", "ministral3_14b"])
@pytest.mark.parametrize("layout", [H100, H100_TP2, TP4_SP, TP8_SP], ids=" ".join)
def test_released_sizes_take_every_recipe_in_every_layout(model: str, layout: tuple[str, ...], recipe: str) -> None:
    config = compose_run_config([*GIVEN, f"model={model}", *layout, f"precision.fp8={recipe}"])
    check_rules(config, config.parallel.model_parallel)


def test_delayed_scaling_is_not_offered_and_what_is_gets_named() -> None:
    with pytest.raises(ConfigError, match="tensorwise"):
        compose_run_config([*GIVEN, "precision.fp8=delayed"])
