"""The GPU benchmark at toy size: every part runs, all joint steps agree, and GPU.md has a row for each figure."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from conf.schema import Objective
from conf.system.errors import UserError
from tests.bench import bench_gpu
from tests.bench.gpu import recipe
from tests.bench.gpu.attention import FLASH, FLASH_FORMS, FLEX, is_flash_installed
from tests.bench.gpu.figures import NOT_YET, Failed, Figure, build_figures, take
from tests.bench.gpu.head import list_ways as list_head_ways
from tests.bench.gpu.meter import Meter, attempt, measure
from tests.bench.gpu.operators import list_ways as list_operator_ways
from tests.bench.gpu.parts import ORDER
from tests.bench.gpu.report import list_columns, list_table_rows
from tests.bench.gpu.settings import LENGTHS, SLICE, build_settings, compose_fp8
from tests.bench.gpu.steps import AGAIN, CONTRIBUTIONS, STEPS, build_workbench
from tests.bench.joint.cases import build_step
from tests.bench.joint.sides import AR, trainer_session

RECORD = Path(__file__).parents[1] / "GPU.md"
TOY_LENGTH = 64


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of all parts."""
    output = tmp_path_factory.mktemp("bench") / "gpu.json"
    found = bench_gpu.measure(build_settings(toy=True), list(ORDER), output, budget_minutes=5)
    assert json.loads(output.read_text())["parts"].keys() == found["parts"].keys() == set(ORDER)
    return found["parts"] | {"left_out": found["left_out"]}


def assert_agree(results: dict[str, Any], tolerance: float) -> None:
    for part, names in (("steps", STEPS), ("contributions", CONTRIBUTIONS)):
        found = results[part][str(TOY_LENGTH)]
        assert set(found) == set(names)
        differences = {name: result["difference"] for name, result in found.items() if name != AR}
        assert all(isinstance(value, float) and value < tolerance for value in differences.values()), differences


def test_recipe_ours_and_every_change_between_have_the_same_loss_and_gradients(results: dict[str, Any]) -> None:
    assert_agree(results, tolerance=1e-5)
    recipe_bytes, ours_bytes = (results["steps"][str(TOY_LENGTH)][name]["peak_bytes"] for name in ("recipe", "ours"))
    assert 0 < ours_bytes < recipe_bytes


def test_every_part_measures_what_its_figures_read(results: dict[str, Any]) -> None:
    assert results["left_out"] == []
    attention, head, operators = (results[part][str(TOY_LENGTH)] for part in ("attention", "head", "operators"))
    assert "backward" in attention[FLEX]["error"], "FlexAttention does not train on the CPU, and ends nothing else"
    reason = "backward" if is_flash_installed() else "flash-attn-4 is not installed: pip install"
    assert len(FLASH_FORMS) == 3 and all(reason in attention[name]["error"] for name in FLASH_FORMS)
    assert attention["fastest"] is None
    assert attention[FLASH]["tflops"] > 0
    assert [name for name, way in head.items() if way["seconds"] > 0] == list_head_ways()
    assert {name for name, way in operators.items() if way["seconds"] > 0} == set(list_operator_ways())
    saved = results["saved"][str(TOY_LENGTH)]
    # Inputs and outputs of both norms 4, query, key and value 1.5, attended 1, fc1's output 7, SwiGLU's 3.5.
    assert saved["ours"]["layer"] == pytest.approx(17.0, abs=0.3)
    assert saved["ours"]["layer"] < saved["recipe"]["layer"] and saved["ours"]["head"] < saved["recipe"]["head"] / 3
    again = results["recompute"][str(TOY_LENGTH)]
    less = 5.5  # outputs of norms 2, SwiGLU's 3.5
    assert saved["ours"]["layer"] - saved[AGAIN]["layer"] == pytest.approx(less, abs=0.01)
    assert again[AGAIN]["difference"] == 0 and again[AGAIN]["peak_bytes"] < again["ours"]["peak_bytes"]
    assert sum(results["profile"][str(TOY_LENGTH)].values()) <= 1
    cells = {row[0]: row[2] for row in list_table_rows(results, [TOY_LENGTH])}
    assert cells[f"attention, {FLEX}: TFLOP/s"] == "failed: NotImplementedError"
    assert {name for name, cell in cells.items() if cell == NOT_YET} == {
        "attention, flex, autotuned: TFLOP/s",
        "attention, dense causal cuDNN: TFLOP/s",
        "joint step, fp8 over bf16: tokens/s",
        "joint step, fp8: MFU of the bf16 peak",
    }


def test_the_record_has_a_row_for_every_figure() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in RECORD.read_text().splitlines()]
    start = lines.index(list_columns(list(LENGTHS)))
    recorded = [row[:2] for row in lines[start + 2 : start + 2 + len(build_figures())]]
    assert recorded == [row[:2] for row in list_table_rows({}, list(LENGTHS))]


def test_the_slice_is_that_of_the_8b_model() -> None:
    assert (SLICE.hidden_size, SLICE.ffn_hidden_size, SLICE.num_layers, SLICE.vocab_size) == (4096, 14336, 4, 32768)
    assert (SLICE.num_attention_heads, SLICE.num_key_value_heads, SLICE.head_dim) == (32, 8, 128)


def test_bounds_say_met_or_missed_at_their_lengths() -> None:
    figure = Figure("speed", "steps", take("ours", "x"), "{:.2f}x", at_least={4096: 1.1, 16384: 1.2})
    results = {"steps": {"4096": {"ours": {"x": 1.15}}, "16384": {"ours": {"x": 1.15}}, "64": {"ours": {"x": 1}}}}
    assert [figure.cell(results, length) for length in (4096, 16384, 64)] == ["1.15x (met)", "1.15x (missed)", "1.00x"]
    assert figure.wanted() == ">= 1.1x at 4096, >= 1.2x at 16384"
    with pytest.raises(Failed, match="OutOfMemoryError"):
        figure.read({"ours": {"error": "OutOfMemoryError: tried to allocate"}})


def test_what_fails_is_named_and_the_rest_is_measured() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel\nfor this")

    left = iter(range(4))
    meter = Meter(torch.device("cpu"))
    functions = {"fails": fail, "fails later": lambda: next(left), "works": lambda: torch.ones(10)}
    found = measure(meter, functions, rounds=3)
    assert found["fails"] == {"error": "RuntimeError: no kernel"}
    assert found["fails later"] == {"error": "StopIteration: "}
    assert found["works"]["peak_bytes"] == 40
    assert attempt(meter, lambda: None) is None


def test_a_layer_of_the_recipe_compiles_to_one_graph_for_all_layers() -> None:
    settings = build_settings(toy=True)
    counter = CompileCounter()
    with trainer_session(settings.runtime):
        bench, case = build_workbench(settings), settings.case(TOY_LENGTH)
        side = replace(bench.side, step=build_step(case, Objective.joint))
        step = recipe.Recipe(side, case, recipe.Changes())
        step.run_layer = torch.compile(recipe._run_layer, backend=counter, dynamic=False, fullgraph=True)
        step.run()
    assert len(step.layers) == 2
    assert counter.frame_count == 1


def test_without_a_device_or_fp8_one_line_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(UserError, match="--toy"):
        build_settings(toy=False)
    with pytest.raises(UserError, match="--fp8"):
        compose_fp8([])


@pytest.mark.gpu
def test_recipe_and_ours_agree_on_the_gpu(results: dict[str, Any]) -> None:
    assert_agree(results, tolerance=5e-2)
