"""The models that benchmarks of decoding and drafting judge: trained from nothing on real text.

    sources of Python's library and of torch --> tokens --> AR stage --> joint stage --> export

Every step continues where it was interrupted and does nothing once it is done. MEDIUM takes an hour on two cores, SMALL
a quarter of that. A folder of runs/ may be a link to a place that several working copies share.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.composition.compose import compose_run_config
from data_pipeline.prepare.run import prepare_sources
from data_pipeline.toy.corpus import TextSplit, load_standard_library, write_jsonl
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from pretrain.run.metrics import load_metrics
from tests.bench.processes import run_all

GROUPS = ("library", "torch")  # of held-out prompts: where the text is from


@dataclass(frozen=True)
class BenchModel:
    """A model of experiment=medium_ar and medium_joint.

    root: run.root of its runs. sizes: overrides of both stages. tokens: of each stage; none are the experiment's.
    """

    root: Path
    sizes: tuple[str, ...] = ()
    tokens: tuple[tuple[str, str], ...] = (("ar", ""), ("joint", ""))

    @property
    def folder(self) -> Path:
        """The folder of data, runs and export."""
        return self.root / "medium"

    @property
    def export(self) -> Path:
        """The trained model."""
        return self.folder / "export"

    def build(self) -> Path:
        """Build what is missing of the export and return its folder."""
        self.prepare_data()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        for stage, tokens in self.tokens:
            budget = [f"train.tokens={tokens}"] if tokens else []
            overrides = [f"experiment=medium_{stage}", f"run.root={self.root}", *self.sizes, *budget]
            if not self.export.exists():
                run_all([[*launcher, "pretrain.train", *overrides]])
        if not self.export.exists():
            joint = str(self.folder / "joint")
            run_all([[sys.executable, "-m", "model.convert", "--from", joint, "--to", str(self.export)]])
        return self.export

    def prepare_data(self) -> None:
        """Prepare tokenizer, texts and tokens from this environment's packages: the same with the same versions."""
        config = compose_run_config(["experiment=medium_ar", f"run.root={self.root}"])
        folder = self.folder / "data" / "text"  # as conf/data/medium.yaml reads it
        tokenizer, files = (
            Path(config.data.tokenizer),
            {name: folder / f"{name}.jsonl" for name in ("train", "heldout")},
        )
        if not all(path.exists() for path in (tokenizer, *files.values())):
            texts = load_texts()
            save_tokenizer(train_tokenizer(texts["library"].train, config.model.vocab_size), tokenizer)
            for split, path in files.items():
                write_jsonl(({"text": text} for group in GROUPS for text in getattr(texts[group], split)), path)
        prepare_sources(config.data)

    def measure_flatness(self) -> float:
        """Return the share by which the held-out diffusion loss still fell over the last fifth of the joint stage."""
        lines = load_metrics(self.folder / "joint", "heldout")
        last = lines[-1]
        fifth = min(lines, key=lambda line: abs(line["tokens_seen"] - 0.8 * last["tokens_seen"]))
        return 1 - last["diffusion_loss"] / fifth["diffusion_loss"]


MEDIUM = BenchModel(Path("runs"))
SMALL = BenchModel(
    Path("runs/small"),
    ("model.hidden_size=256", "model.ffn_hidden_size=768", "model.num_attention_heads=4"),
    (("ar", "2e6"), ("joint", "3e6")),
)
MODELS = {"small": SMALL, "medium": MEDIUM}


def load_texts() -> dict[str, TextSplit]:
    """Return source files by group; every tenth is held out."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    return {"library": load_standard_library(), "torch": load_standard_library(Path(torch.origin).parent)}
