"""Layouts obey the rules, fit, come in order, and there is a reason where there is none."""

import pytest

from conf.composition.compose import compose_size
from conf.rules.run import check_rules
from launch.plan.hardware_profile import GIGA, HardwareProfile
from launch.plan.layout_plan import plan_layout
from launch.plan.search import Search, search_layouts
from launch.plan.tables import explain_failure
from tests.helpers.layouts import H100_TP2


def search(*overrides: str, gpus: int = 64, **hardware: float) -> Search:
    return search_layouts(compose_size(list(overrides)), gpus, HardwareProfile(**hardware))  # type: ignore[arg-type]


def test_layouts_fit_obey_the_rules_and_come_fastest_first() -> None:
    found = search("experiment=nld_8b_joint")
    assert len(found.feasible) > 10
    for plan in found.feasible:
        check_rules(plan.config, 64)
        assert plan.fullest.total <= HardwareProfile().usable_bytes
        assert plan.config.parallel.tensor_parallel <= 8
    times = [plan.time.total for plan in found.feasible]
    assert times == sorted(times)


def test_what_the_search_changes_is_the_layout_alone() -> None:
    config = compose_size(["experiment=nld_3b_sft"])
    best = search("experiment=nld_3b_sft").feasible[0].config
    assert (best.model, best.data, best.stage, best.precision) == (
        config.model,
        config.data,
        config.stage,
        config.precision,
    )
    assert best.train.global_batch_size == config.train.global_batch_size


def test_less_memory_leaves_fewer_layouts() -> None:
    large, small = (
        {
            str(plan.config.parallel) + str(plan.config.train)
            for plan in search("experiment=nld_8b_sft", memory_bytes=m).feasible
        }
        for m in (80 * GIGA, 40 * GIGA)
    )
    assert small < large


def test_without_room_the_nearest_layout_and_what_is_missing_are_named() -> None:
    found = search("experiment=nld_14b_sft", gpus=8, memory_bytes=24 * GIGA)
    assert not found.feasible
    message = explain_failure(found, HardwareProfile(memory_bytes=24 * GIGA))
    assert "GB too much" in message
    assert "parallel.recompute=full" in message


def test_without_a_layout_the_rule_is_named() -> None:
    found = search("experiment=nld_8b_ar", "train.global_batch_size=2", gpus=96)
    assert not found.feasible
    assert "train.global_batch_size" in explain_failure(found, HardwareProfile())


def test_recomputation_costs_time_and_frees_memory() -> None:
    given = ["experiment=nld_8b_joint", *H100_TP2, "train.micro_batch_size=1"]
    kinds = ("none", "elementwise", "selective", "full")
    plans = {
        kind: plan_layout(compose_size([*given, f"parallel.recompute={kind}"]), 64, HardwareProfile()) for kind in kinds
    }
    seconds = [plan.time.total for plan in plans.values()]
    assert seconds == sorted(seconds)
    assert plans["full"].fullest.total < plans["elementwise"].fullest.total < plans["none"].fullest.total
    # 16 microbatches, 34 layers, gate, up and output in bf16 over 2 ranks; norms are fused. Few noisy blocks stay out.
    positions = 4096 + plans["none"].work.noisy_length
    assert 8000 < positions < 8192
    bytes_moved = 16 * 34 * positions * 3 * 14336 * 2 / 2
    assert plans["elementwise"].time.recomputation == pytest.approx(bytes_moved / HardwareProfile().memory_bandwidth)
    sent = [sum(item.sent_bytes for item in plans[kind].traffic) for kind in ("none", "elementwise")]
    assert sent[0] == sent[1]


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_slower_network_makes_data_parallelism_dearer(overlap: str) -> None:
    config = compose_size(
        ["experiment=nld_3b_ar", f"parallel.overlap_grad_reduce={overlap}", f"parallel.overlap_param_gather={overlap}"]
    )
    fast, slow = (
        search_layouts(config, 64, HardwareProfile(network_bandwidth=bandwidth * GIGA)).feasible[0].time.total
        for bandwidth in (50, 1)
    )
    assert slow > fast


def test_sequences_too_long_for_a_rank_are_split_over_several() -> None:
    long = ("experiment=nld_8b_joint", "data.sequence_length=262144", "train.global_batch_size=8")
    found = search(*long)
    layouts = [plan.config.parallel for plan in found.feasible]
    assert layouts[0].context_parallel > 1
    assert all(
        plan.config.train.micro_batch_size == 1 for plan in found.feasible if plan.config.parallel.context_parallel > 1
    )
    whole = search(*long, memory_bytes=1000 * GIGA).feasible
    assert {plan.config.parallel.context_parallel for plan in whole} >= {1, 2, 4, 8}
    assert all((plan.time.context > 0) == (plan.config.parallel.context_parallel > 1) for plan in whole)
