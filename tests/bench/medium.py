"""The model that benchmarks of decoding and drafting judge: trained from nothing on real text, an hour on two cores.

    sources of Python's library and of torch --> tokens --> AR stage --> joint stage --> export

Every step continues where it was interrupted and does nothing once it is done. Used through `runs/medium`.
"""

import importlib.util
import sys
from pathlib import Path

from conf.composition.compose import compose_run_config
from data_pipeline.prepare.run import prepare_sources
from data_pipeline.toy.corpus import TextSplit, load_standard_library, write_jsonl
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from pretrain.run.metrics import load_metrics
from tests.bench.processes import run_all

ROOT = Path("runs/medium")
EXPORT = ROOT / "export"
TEXTS = ROOT / "data" / "text"  # as conf/data/medium.yaml reads it
GROUPS = ("library", "torch")  # of held-out prompts: where the text is from


def build_medium_model() -> Path:
    """Build what is missing of the export and return its folder."""
    prepare_data()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    for stage in ("ar", "joint"):
        run_all([[*launcher, "pretrain.train", f"experiment=medium_{stage}"]])
    if not EXPORT.exists():
        run_all([[sys.executable, "-m", "model.convert", "--from", str(ROOT / "joint"), "--to", str(EXPORT)]])
    return EXPORT


def prepare_data() -> None:
    """Prepare tokenizer, texts and tokens from this environment's packages: the same for everyone with its versions."""
    config = compose_run_config(["experiment=medium_ar"])
    tokenizer, files = Path(config.data.tokenizer), {split: TEXTS / f"{split}.jsonl" for split in ("train", "heldout")}
    if not all(path.exists() for path in (tokenizer, *files.values())):
        texts = load_texts()
        save_tokenizer(train_tokenizer(texts["library"].train, config.model.vocab_size), tokenizer)
        for split, path in files.items():
            write_jsonl(({"text": text} for group in GROUPS for text in getattr(texts[group], split)), path)
    prepare_sources(config.data)


def load_texts() -> dict[str, TextSplit]:
    """Return source files by group; every tenth is held out."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    return {"library": load_standard_library(), "torch": load_standard_library(Path(torch.origin).parent)}


def measure_flatness() -> float:
    """Return the share by which the held-out diffusion loss still fell over the last fifth of the joint stage."""
    lines = load_metrics(ROOT / "joint", "heldout")
    last = lines[-1]
    fifth = min(lines, key=lambda line: abs(line["tokens_seen"] - 0.8 * last["tokens_seen"]))
    return 1 - last["diffusion_loss"] / fifth["diffusion_loss"]
