"""A run whose blend changes on resume trains on exactly the next unread sequences of every source."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from conf.composition.compose import compose_run_config
from pretrain.run.run_data import RunData, open_data
from tests.helpers.processes import kill_when, load_lines, train_many
from tests.helpers.toy_data import ToyData, tokens_of
from tests.helpers.train_jobs import digest_tokens

FIRST, CHANGED = {"web": 3, "code": 1}, {"web": 1, "code": 2, "chats": 1}
BATCH = 8


def overrides(data: ToyData, root: Path, name: str, steps: int, weights: dict[str, int], *extra: str) -> list[str]:
    """Return the overrides of a joint run of `steps` steps on a blend with these weights."""
    paths = {"web": data.train, "code": data.heldout, "chats": data.train_chats}
    blend = ", ".join(f"{name}: {{path: {paths[name]}, weight: {weight}}}" for name, weight in weights.items())
    where = [f"run.root={root}", f"run.name={name}", "stage=joint", f"data.train={{{blend}}}", "data.heldout=null"]
    return [*data.overrides(), *where, tokens_of(steps), "checkpoint.every_steps=2", "checkpoint.keep=9", *extra]


def find_trained(run_dir: Path, data: RunData, num_samples: int) -> list[tuple[str, int]]:
    """Find source and number of every sample's sequence by comparing with what the trainer recorded."""
    candidates = {}
    for name, source in data.train.sources.items():
        for number in range(num_samples):
            candidates.setdefault(digest_tokens(source.build_sequence(number).tokens[0]), (name, number))
    recorded = json.loads((run_dir / "tokens_rank0.json").read_text())
    return [candidates[recorded[f"train/{sample}"]] for sample in range(num_samples)]


def test_after_a_change_each_source_goes_on_at_its_own_next_sequence(toy_data: ToyData, tmp_path: Path) -> None:
    """Two steps, two with other weights and a new source, two more after another start, two without a source."""
    parts = [(2, FIRST), (4, CHANGED), (6, CHANGED), (8, {"web": 1, "chats": 1})]
    jobs = [overrides(toy_data, tmp_path, "run", steps, weights) for steps, weights in parts]
    train_many(1, jobs, tmp_path)
    trained = find_trained(tmp_path / "run", open_data(compose_run_config(jobs[1])), 8 * BATCH)
    numbers: dict[str, list[int]] = defaultdict(list)
    for name, number in trained:
        numbers[name].append(number)
    assert all(found == list(range(len(found))) for found in numbers.values())
    assert {name for name, _ in trained[: 2 * BATCH]} == {"web", "code"}
    assert {name for name, _ in trained[2 * BATCH : 6 * BATCH]} == {"web", "code", "chats"}
    assert {name for name, _ in trained[6 * BATCH :]} == {"web", "chats"}
    first = open_data(compose_run_config(jobs[0])).train
    assert trained[: 2 * BATCH] == [first.locate(sample) for sample in range(2 * BATCH)]
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("a new blend begins at sample") == 2
    assert "data.train.code.weight 1.0 -> 2.0" in log
    changes = (tmp_path / "run" / "starts" / "001" / "changes.txt").read_text()
    assert "data.train.web.weight 3.0 -> 1.0\n" in changes and "chats new -> 25.0%" in changes


@pytest.mark.slow
def test_killed_after_a_change_it_resumes_bit_for_bit(toy_data: ToyData, tmp_path: Path) -> None:
    before, after = (
        [overrides(toy_data, tmp_path, name, steps, weights) for name in ("run", "whole")]
        for steps, weights in ((2, FIRST), (8, CHANGED))
    )
    train_many(1, [*before, after[1]], tmp_path)
    kill_when("checkpoints/step_00000004", tmp_path / "run", 1, "pretrain.train", after[0])
    train_many(1, [after[0]], tmp_path)
    keys = ("step", "tokens_seen", "loss", "grad_norm", "lr", "masking_ratio")
    curves = [
        [[line[key] for key in keys] for line in load_lines(tmp_path / name, "train")] for name in ("run", "whole")
    ]
    assert len(curves[0]) == 8 and curves[0] == curves[1]
