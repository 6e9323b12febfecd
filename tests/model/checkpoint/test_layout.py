"""Checkpoint folders: what counts as complete, and one clear error for everything else."""

import json
from dataclasses import asdict, replace

import pytest

from conf.schema import ModelConfig, RopeConfig
from conf.system.errors import UserError
from model.checkpoint import layout

MODEL = ModelConfig(
    name="toy",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=384,
    rope=RopeConfig(factor=0.25),
)


def make_manifest(**changes) -> layout.CheckpointManifest:
    manifest = layout.CheckpointManifest(
        step=100,
        tokens_seen=409600,
        samples_seen=100,
        stage="ar",
        block_size=32,
        model=asdict(MODEL),
        tokenizer={"fingerprint": "ab", "mask_token_id": 100, "vocab_size": 384},
        eos_token_id=2,
        dtype="bfloat16",
    )
    return replace(manifest, **changes)


def write_step(run, step):
    directory = layout.step_directory(run, step)
    directory.mkdir(parents=True)
    layout.save_checkpoint_manifest(directory, make_manifest(step=step))
    return directory


def test_step_directories_sort_by_step(tmp_path):
    assert layout.step_directory(tmp_path, 100) == tmp_path / "checkpoints" / "step_00000100"
    expected = [write_step(tmp_path, step) for step in (9, 100, 123456789)]
    assert layout.list_complete_steps(tmp_path) == expected
    assert layout.find_newest_complete(tmp_path) == expected[-1]
    assert [layout.step_of(path) for path in expected] == [9, 100, 123456789]
    assert layout.run_directory_of(expected[0]) == tmp_path.resolve()


def test_partial_empty_and_foreign_folders_are_not_checkpoints(tmp_path):
    done = write_step(tmp_path, 5)
    layout.partial_directory(layout.step_directory(tmp_path, 6)).mkdir()
    layout.step_directory(tmp_path, 7).mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert layout.list_complete_steps(tmp_path) == [done]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert layout.list_complete_steps(tmp_path / "nothing") == []
    assert layout.find_newest_complete(tmp_path) is None


def test_resolve_accepts_a_run_and_a_step(tmp_path):
    first, second = write_step(tmp_path, 1), write_step(tmp_path, 2)
    assert layout.resolve_checkpoint(tmp_path) == second
    assert layout.resolve_checkpoint(first) == first


def test_resolve_refuses_partial_missing_and_empty_paths(tmp_path):
    partial = layout.partial_directory(write_step(tmp_path, 1))
    with pytest.raises(UserError, match="never completed"):
        layout.resolve_checkpoint(partial)
    with pytest.raises(UserError, match="nothing has this name"):
        layout.resolve_checkpoint(tmp_path / "typo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        layout.resolve_checkpoint(tmp_path / "empty")


def test_a_manifest_survives_the_disk(tmp_path):
    manifest = make_manifest(export={"max_position_embeddings": 4096}, versions={"torch": "2"})
    layout.save_checkpoint_manifest(tmp_path, manifest)
    assert layout.load_checkpoint_manifest(tmp_path) == manifest
    assert layout.model_config_from(layout.load_checkpoint_manifest(tmp_path).model, "here") == MODEL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "format_version None"),
        (json.dumps(asdict(make_manifest(format_version=3))), "newer version.*format_version 3"),
        (json.dumps(asdict(make_manifest()) | {"colour": 1}), "unknown \\['colour'\\]"),
        (json.dumps({k: v for k, v in asdict(make_manifest()).items() if k != "step"}), "missing \\['step'\\]"),
    ],
)
def test_a_bad_manifest_is_one_clear_error(tmp_path, text, message):
    (tmp_path / layout.MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match=message):
        layout.load_checkpoint_manifest(tmp_path)


def test_a_missing_manifest_says_the_checkpoint_is_not_complete(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        layout.load_checkpoint_manifest(tmp_path)


def test_model_values_with_missing_or_unknown_fields_are_refused():
    values = asdict(MODEL)
    with pytest.raises(UserError, match=r"model.rope of here.*unknown \['base'\]"):
        layout.model_config_from(values | {"rope": values["rope"] | {"base": 1}}, "here")
    with pytest.raises(UserError, match=r"missing \['vocab_size'\]"):
        layout.model_config_from({k: v for k, v in values.items() if k != "vocab_size"}, "here")


def test_another_model_is_refused_with_every_differing_field():
    other = replace(MODEL, hidden_size=128, rope=replace(MODEL.rope, factor=16.0))
    with pytest.raises(UserError, match="somewhere holds another model") as caught:
        layout.check_same_model(other, MODEL, "somewhere")
    assert "model.hidden_size: 128 there, 64 requested" in str(caught.value)
    assert "model.rope.factor: 16.0 there, 0.25 requested" in str(caught.value)
    assert "num_layers" not in str(caught.value)


def test_labels_and_claims_may_differ():
    layout.check_same_model(replace(MODEL, name="x", init_std=1.0, max_position_embeddings=1), MODEL, "somewhere")


def test_an_old_checkpoint_that_cannot_be_deleted_is_out_of_the_way(tmp_path, monkeypatch) -> None:
    """Files that others have open stay on network file systems; the new checkpoint is good all the same."""
    write_step(tmp_path, 1)
    final = layout.step_directory(tmp_path, 2)
    write_step(tmp_path, 2)
    final.rename(layout.partial_directory(final))
    monkeypatch.setattr(layout.shutil, "rmtree", lambda path, ignore_errors=False: None)
    layout.publish_step(layout.partial_directory(final), final, keep=1)
    assert layout.list_complete_steps(tmp_path) == [final]
