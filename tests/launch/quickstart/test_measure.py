"""The decoding process measures an export it knows only by its directory."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.system.errors import UserError
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from launch.quickstart import measure
from model.export.load import attach_adapter, load_export
from model.hf.speculation import real_context_acceptance
from tests.helpers.tiny_exports import make_repetitive_model, save_random_adapter
from tests.helpers.toy_data import prepare_texts

TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" * 8 for i in range(40)]
SHAPE: dict[str, Any] = {"vocab_size": 360, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heldout")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=360), directory / "tokenizer")
    prepare_texts(TEXTS, directory / "tokenizer", directory / "heldout")
    return directory / "heldout"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, heldout: Path) -> Path:
    """Write a model whose drafts are all accepted, an adapter that spoils them, its code and tokenizer files."""
    directory = tmp_path_factory.mktemp("export") / "export"
    make_repetitive_model(**SHAPE).save_pretrained(directory)
    save_random_adapter(directory / "linear_spec_lora", rank=16, std=3.0, **SHAPE)
    for path in (heldout.parent / "tokenizer").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_PROMPTS": 2, "PROMPT_TOKENS": 24, "NEW_TOKENS": 12, "NUM_CONTEXTS": 20}.items():
        monkeypatch.setattr(measure, name, value)


def test_every_mode_is_measured(export: Path, heldout: Path) -> None:
    values = measure.run_decoding(export, heldout)
    modes = values["modes"]
    assert list(modes) == ["ar", "block_diffusion", "linear", "quadratic", "linear+adapter"]
    assert modes["ar"]["tokens_per_forward"] == 1
    assert modes["ar"]["real_context_acceptance"] is modes["block_diffusion"]["acceptance_length"] is None
    for mode in ("linear", "quadratic", "linear+adapter"):
        measured = modes[mode]
        assert measured["equals_greedy_ar"] is True
        assert 1 <= measured["acceptance_length"] <= 8
        assert measured["tokens_per_forward"] == pytest.approx(measured["new_tokens"] / measured["num_forwards"])
    assert modes["quadratic"]["num_forwards"] < modes["linear"]["num_forwards"]


def test_only_the_last_mode_drafts_with_the_adapter(export: Path, heldout: Path) -> None:
    """Compare with the repository's own loading, without and with the adapter attached."""
    modes = measure.run_decoding(export, heldout)["modes"]
    model = load_export(export, dtype="fp32", device="cpu")
    prefixes = measure.choose_prefixes(heldout, 20)
    without = real_context_acceptance(model, prefixes, 8).double().mean()
    attach_adapter(model, export / "linear_spec_lora")
    adapted = real_context_acceptance(model, prefixes, 8).double().mean()
    assert modes["linear"]["real_context_acceptance"] == without
    assert modes["linear+adapter"]["real_context_acceptance"] == adapted
    assert adapted < without == 8


def test_an_export_without_a_draft_adapter_is_named(export: Path, heldout: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "export", ignore=shutil.ignore_patterns("linear_spec_lora"))
    with pytest.raises(UserError, match="no draft adapter in"):
        measure.run_decoding(tmp_path / "export", heldout)


def test_prefixes_are_spread_over_the_heldout_text(heldout: Path) -> None:
    prefixes = measure.choose_prefixes(heldout, 10)
    assert prefixes.shape == (10, 24)
    assert len({tuple(row) for row in prefixes.tolist()}) > 1


def test_acceptance_length_counts_cycles_not_forwards() -> None:
    """Prefill, three full cycles of two forwards, one lone last token of one forward: 4 cycles for 11 - 1 tokens."""
    run = measure.Continuations(tokens=[list(range(11))], num_forwards=[1 + 3 * 2 + 1], seconds=2.0)
    measured = measure.measure_mode("linear", run, run, real_context_acceptance=1.5)
    assert measured.acceptance_length == 10 / 4
    assert measured.tokens_per_second == 5.5
    assert measured.equals_greedy_ar


def test_a_cycle_of_quadratic_speculation_is_one_forward() -> None:
    run = measure.Continuations(tokens=[list(range(11)), [0]], num_forwards=[1 + 4, 1], seconds=2.0)
    assert measure.measure_mode("quadratic", run, run).acceptance_length == 10 / 4
    assert measure.measure_mode("block_diffusion", run, run).acceptance_length is None


def test_a_missing_export_is_named(tmp_path: Path, heldout: Path) -> None:
    with pytest.raises(UserError, match="export the joint run first"):
        measure.run_decoding(tmp_path / "nothing", heldout)


def test_missing_or_short_heldout_text_is_named(export: Path, heldout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data"):
        measure.run_decoding(export, tmp_path / "nothing")
    with pytest.raises(UserError, match="are needed"):
        measure.choose_prefixes(heldout, 100_000)
