"""How evenly a step's work is dealt over data-parallel ranks, and what it costs to find out.

    python -m tests.bench.data.dealing

Outlines of sequences are drawn, not read: texts packed to the end (log-normal with a median of 700 tokens), single
documents, and chats whose prompts are 30, 60 and 90 % of them, a third each, so that sequences differ. Costs are FLOPs
of the 8B model. Every figure is the mean over STEPS global batches.
"""

import sys
import time
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from conf.system.entry import OneLineParser, exit_status
from data_pipeline.dealing import Deal
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Outline, count_positions
from pretrain.step.balance import StepBalance

LENGTH, BLOCK_SIZE, STEPS = 4096, 32, 5
LAYOUTS = ((8, 1, 1), (8, 1, 4), (8, 1, 16), (64, 1, 4), (8, 4, 1), (8, 4, 4))
KINDS = ("one document", "packed texts", "packed chats")


@dataclass
class DrawnBlend:
    """Draws the outline of every sample; it has no tokens."""

    kind: str
    form: SequenceForm = field(default_factory=lambda: SequenceForm(LENGTH, BLOCK_SIZE, BLOCK_SIZE))

    @property
    def sources(self) -> dict[str, "DrawnBlend"]:
        """Return itself: the one source, whose form is asked for."""
        return {self.kind: self}

    def outline(self, sample_index: int) -> Outline:
        """Return the outline of a sequence."""
        generator = np.random.default_rng(sample_index)
        if self.kind == KINDS[0]:
            return Outline(np.array([LENGTH]), np.array([0]), np.array([False]))
        lengths, room, is_chat = [], LENGTH, self.kind == KINDS[2]
        share = generator.choice((0.3, 0.6, 0.9))
        while room >= 2 * BLOCK_SIZE:
            tokens = int(np.clip(generator.lognormal(np.log(700), 1), 2 * BLOCK_SIZE, room))
            prompt = int(tokens * share) // BLOCK_SIZE * BLOCK_SIZE if is_chat else 0
            parts = [max(1, prompt), max(1, tokens - max(1, prompt))] if is_chat else [tokens]
            if sum(count_positions(np.array(parts), BLOCK_SIZE)) > room:
                break
            lengths.append(parts)
            room -= int(sum(count_positions(np.array(parts), BLOCK_SIZE)))
        flat = np.array([length for parts in lengths for length in parts])
        documents = np.repeat(np.arange(len(lengths)), 2 if is_chat else 1)
        return Outline(flat, documents, (np.arange(len(flat)) % 2 == 0) & is_chat)


def measure_dealing(kind: str, ranks: int, size: int, microbatches: int) -> tuple[list[Deal], float]:
    """Return the deals of STEPS steps, and the seconds per sequence that finding them took."""
    config = build_config(ranks, size, microbatches)
    drawn = DrawnBlend(kind)
    outlines = {index: drawn.outline(index) for index in range(STEPS * config.train.global_batch_size)}
    drawn.outline = outlines.__getitem__  # type: ignore[method-assign]
    balance = StepBalance(config, drawn, NoiseSource(1, "joint", "train", 1e-3), ranks)  # type: ignore[arg-type]
    started = time.process_time()
    deals = [balance(step * config.train.global_batch_size) for step in range(STEPS)]
    return deals, (time.process_time() - started) / len(outlines)


def build_config(ranks: int, size: int, microbatches: int) -> RunConfig:
    """Return the 8B model's joint stage with this global batch."""
    batch = [f"train.micro_batch_size={size}", f"train.global_batch_size={ranks * size * microbatches}"]
    sequence = [f"data.sequence_length={LENGTH}", f"stage.block_size={BLOCK_SIZE}"]
    return compose_size(["stage=joint", "model=ministral3_8b", "train.tokens=1e9", *batch, *sequence])


def main() -> None:
    """Print a table: the fullest rank, and the fullest microbatch, over the mean."""
    OneLineParser(prog="python -m tests.bench.data.dealing", description=__doc__).parse_args()
    columns = ("sequences", "ranks", "micro_batch_size", "microbatches per rank")
    table = Table(*columns, "rank in order", "dealt", "microbatch in order", "dealt", "ms per sequence")
    for kind in KINDS:
        for ranks, size, microbatches in LAYOUTS:
            deals, seconds = measure_dealing(kind, ranks, size, microbatches)
            names = ("undealt_rank", "rank", "undealt_microbatch", "microbatch")
            found = [fmean(getattr(deal, f"{name}_imbalance") for deal in deals) for name in names]
            cells = [f"{value:.3f}" for value in found]
            table.add_row(kind, str(ranks), str(size), str(microbatches), *cells, f"{1e3 * seconds:.2f}")
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(exit_status(main))
