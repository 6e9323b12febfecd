"""summary.json has the promised fields, and its checks tell a working system from a broken one."""

import json
from collections.abc import Callable

import pytest

from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.errors import UserError
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.loss_curves import load_curves
from launch.quickstart.summary import build_summary, check_summary, save_summary

MODE_FIELDS = {
    "new_tokens",
    "num_forwards",
    "tokens_per_forward",
    "acceptance_length",
    "real_context_acceptance",
    "tokens_per_second",
    "equals_greedy_ar",
}
STAGE_FIELDS = {
    "layout",
    "steps",
    "tokens",
    "first_train_loss",
    "last_train_loss",
    "heldout_ar_loss",
    "heldout_diffusion_loss",
}


@pytest.fixture
def summarize(configs: dict[str, RunConfig], drafter: DrafterConfig) -> Callable[[QuickstartFolder], dict]:
    def call(folder: QuickstartFolder) -> dict:
        stages = [load_curves(stage, folder.run(stage)) for stage in configs]
        return build_summary(folder, stages, configs, drafter, {"data": 2.0, "joint": 200.5})

    return call


def test_promised_fields_are_there(finished_folder: QuickstartFolder, summarize) -> None:
    save_summary(finished_folder, summarize(finished_folder))
    summary = json.loads(finished_folder.summary.read_text())
    assert set(summary) >= {"modes", "stages", "drafter", "unigram_entropy", "export_dir", "seconds", "versions"}
    assert list(summary["modes"]) == ["ar", "block_diffusion", "linear", "quadratic", "linear+adapter"]
    assert all(set(values) >= MODE_FIELDS for values in summary["modes"].values())
    assert all(set(values) >= STAGE_FIELDS for values in summary["stages"].values())
    assert summary["seconds"] == {"data": 2.0, "joint": 200.5, "total": 202.5}
    assert set(summary["versions"]) >= {"python", "torch", "megatron-core", "transformers", "peft", "deepspeed"}


def test_stages_are_described_by_their_runs(finished_folder: QuickstartFolder, summarize) -> None:
    stages = summarize(finished_folder)["stages"]
    assert stages["ar"]["layout"] == {"tensor_parallel": 2, "pipeline_parallel": 1, "data_parallel": 1}
    assert stages["joint"]["layout"] == {"tensor_parallel": 1, "pipeline_parallel": 2, "data_parallel": 1}
    joint = stages["joint"]
    assert (joint["steps"], joint["tokens"], joint["first_train_loss"], joint["last_train_loss"]) == (
        40,
        4000,
        2.6,
        2.2,
    )
    assert (joint["heldout_ar_loss"], joint["heldout_diffusion_loss"]) == (2.2, pytest.approx(3.2))
    assert stages["ar"]["heldout_diffusion_loss"] is None


def test_the_drafter_is_described_by_its_run(finished_folder: QuickstartFolder, summarize) -> None:
    drafter = summarize(finished_folder)["drafter"]
    assert (drafter["rank"], drafter["steps"], drafter["tokens"]) == (32, 10, 10_000)
    assert [entry["acceptance_length"] for entry in drafter["heldout_evaluations"]] == [1.9, 2.3]


def test_a_good_run_passes_every_check(finished_folder: QuickstartFolder, summarize) -> None:
    assert all(check["passed"] for check in summarize(finished_folder)["checks"])


@pytest.mark.parametrize(
    ("number", "spoil"),
    [
        (0, lambda s: s.update(unigram_entropy=2.69)),
        (1, lambda s: s["stages"]["joint"]["heldout_evaluations"][2].update(diffusion_loss=3.7)),
        (1, lambda s: s["stages"]["joint"].update(heldout_evaluations=s["stages"]["joint"]["heldout_evaluations"][:3])),
        (2, lambda s: s["stages"]["sft"]["heldout_evaluations"][-1].update(ar_loss=2.5)),
        (3, lambda s: s["modes"]["linear"].update(real_context_acceptance=1.8)),
        (4, lambda s: s["modes"]["linear"].update(equals_greedy_ar=False)),
        (5, lambda s: s["modes"]["linear+adapter"].update(real_context_acceptance=2.0)),
        (6, lambda s: s["modes"]["linear+adapter"].update(equals_greedy_ar=False)),
        (7, lambda s: s["modes"]["quadratic"].update(equals_greedy_ar=False)),
    ],
)
def test_each_broken_promise_fails_its_check(finished_folder: QuickstartFolder, summarize, number: int, spoil) -> None:
    summary = summarize(finished_folder)
    spoil(summary)
    assert [check.passed for check in check_summary(summary)] == [i != number for i in range(8)]


@pytest.mark.parametrize("name", ["decoding", "unigram"])
def test_a_missing_input_is_named(finished_folder: QuickstartFolder, summarize, name: str) -> None:
    path = getattr(finished_folder, name)
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        summarize(finished_folder)


def test_measurements_of_an_earlier_version_are_named(finished_folder: QuickstartFolder, summarize) -> None:
    decoding = json.loads(finished_folder.decoding.read_text())
    del decoding["modes"]["quadratic"]
    finished_folder.decoding.write_text(json.dumps(decoding))
    with pytest.raises(UserError, match="lacks quadratic"):
        summarize(finished_folder)
