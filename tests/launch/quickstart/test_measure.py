"""The decoding process measures an export it knows only by its directory."""

from pathlib import Path

import pytest
import torch

from conf.errors import UserError
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer
from launch.quickstart import measure
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from tests.helpers.toy_data import prepare_texts

TEXTS = [f"def function_{i}(x):\n    return x + {i}\n" * 8 for i in range(40)]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heldout")
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=360), directory / "tokenizer")
    prepare_texts(TEXTS, directory / "tokenizer", directory / "heldout")
    return directory / "heldout"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, heldout: Path) -> Path:
    """An untrained model of a few thousand parameters with its code and tokenizer files."""
    directory = tmp_path_factory.mktemp("export") / "export"
    torch.manual_seed(0)
    config = NemotronLabsDiffusionConfig(
        vocab_size=360,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        block_size=8,
    )
    NemotronLabsDiffusionModel(config).save_pretrained(directory)
    for path in (heldout.parent / "tokenizer").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_PROMPTS": 2, "PROMPT_TOKENS": 24, "NEW_TOKENS": 12, "NUM_CONTEXTS": 20}.items():
        monkeypatch.setattr(measure, name, value)


def test_three_modes_are_measured(export: Path, heldout: Path) -> None:
    values = measure.run_decoding(export, heldout)
    modes = values["modes"]
    assert set(modes) == {"ar", "block_diffusion", "linear_speculation"}
    assert modes["ar"]["tokens_per_forward"] == 1
    assert modes["linear_speculation"]["equals_greedy_ar"] is True
    assert modes["ar"]["real_context_acceptance"] is modes["block_diffusion"]["acceptance_length"] is None
    linear = modes["linear_speculation"]
    assert 1 <= linear["acceptance_length"] <= 8
    assert 1 <= linear["real_context_acceptance"] <= 8
    assert linear["tokens_per_forward"] == pytest.approx(linear["new_tokens"] / linear["num_forwards"])


def test_prefixes_are_spread_over_the_heldout_text(heldout: Path) -> None:
    prefixes = measure.choose_prefixes(heldout, 10)
    assert prefixes.shape == (10, 24)
    assert len({tuple(row) for row in prefixes.tolist()}) > 1


def test_acceptance_length_counts_cycles_not_forwards() -> None:
    """Prefill, three full cycles of two forwards, one lone last token of one forward: 4 cycles for 11 - 1 tokens."""
    run = measure.Continuations(tokens=[list(range(11))], num_forwards=[1 + 3 * 2 + 1], seconds=2.0)
    measured = measure.measure(run, run, real_context_acceptance=1.5)
    assert measured.acceptance_length == 10 / 4
    assert measured.tokens_per_second == 5.5
    assert measured.equals_greedy_ar


def test_a_missing_export_is_named(tmp_path: Path, heldout: Path) -> None:
    with pytest.raises(UserError, match="export the joint run first"):
        measure.run_decoding(tmp_path / "nothing", heldout)


def test_missing_or_short_heldout_text_is_named(export: Path, heldout: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data"):
        measure.run_decoding(export, tmp_path / "nothing")
    with pytest.raises(UserError, match="are needed"):
        measure.choose_prefixes(heldout, 100_000)
