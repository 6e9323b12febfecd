"""Load balance of context-parallel ranks: attended pairs and FLOPs of each, counted from the structure of sequences.

    python -m tests.bench.joint.balance [--length 262144]

Every rank holds as many positions as any other; how many keys these see depends on the split and on the documents. All
ranks of a group meet in every layer, where keys are gathered, so the fullest one sets the pace: max / mean of each
sequence.
Split "rounds" is ours (model/attention/context.py: zig-zag in rounds of short chunks), "zig-zag" the usual one (chunks
r and 2C - 1 - r of 2C), "contiguous" gives rank r chunk r of C.
Document lengths are assumptions, log-normal: no published corpus was counted for them.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from conf.composition.compose import compose_size
from conf.schema import ModelConfig
from conf.system.entry import OneLineParser, count, exit_status
from data_pipeline.packing.form import SequenceForm
from data_pipeline.packing.sequence import Segments, count_positions, lay_out
from model.attention.context import MIN_CHUNK_LENGTH, ContextShard
from model.attention.visibility import SequenceLayout, count_visible_keys
from pretrain.costs import count_step_flops

LENGTH, BLOCK_SIZE, NUM_SEQUENCES = 262144, 32, 8
SIZES = (2, 4, 8, 16)
SPLITS = ("rounds", "zig-zag", "contiguous")
MODEL = "ministral3_8b"
COLUMNS = ("pairs", "FLOPs")


@dataclass(frozen=True)
class Documents:
    """Lengths of a sequence's documents in tokens: log-normal with this median and sigma; median 0: only one."""

    name: str
    median: int = 0
    sigma: float = 0.0

    def draw(self, length: int, alignment: int, generator: np.random.Generator) -> np.ndarray:
        """Draw as many as fill `length` positions; the last one is cut there."""
        if not self.median:
            return np.array([length])
        lengths, filled = [], 0
        while filled < length:
            drawn = round(generator.lognormal(math.log(self.median), self.sigma))
            lengths.append(int(np.clip(drawn, 1, length - filled)))
            filled += int(count_positions(np.array([lengths[-1]]), alignment)[0])
        return np.array(lengths)


KINDS = (
    Documents("one document"),
    Documents("median 700", 700, 1.2),  # like web pages
    Documents("median 8000", 8000, 1.5),  # like a mixture for long contexts
)


@dataclass(frozen=True)
class Balance:
    """Mean over sequences of max / mean over the ranks; worst_attended_pairs: the worst sequence's.

    stage: ar or joint. attended_pairs: of the layers. flops: of MODEL's layers, with their weights.
    """

    stage: str
    documents: str
    split: str
    size: int
    attended_pairs: float
    worst_attended_pairs: float
    flops: float


def simulate_balance(
    length: int = LENGTH,
    block_size: int = BLOCK_SIZE,
    sizes: Sequence[int] = SIZES,
    num_sequences: int = NUM_SEQUENCES,
) -> list[Balance]:
    """Simulate every stage, kind of documents, size of the group and split."""
    model = compose_size([f"model={MODEL}", "train.tokens=1e9"]).model
    found = []
    for stage in ("ar", "joint"):
        for documents in KINDS:
            count = num_sequences if documents.median else 1
            layouts = [build_layout(documents, length, block_size, stage == "joint", seed) for seed in range(count)]
            seen = [count_visible_keys(layout, stage == "joint")[0] for layout in layouts]
            for size in sizes:
                for split in SPLITS:
                    held = split_positions(length, stage == "joint", size, split, block_size)
                    ratios = compare_ranks(seen, held, model)
                    found.append(Balance(stage, documents.name, split, size, *ratios))
    return found


def compare_ranks(seen: list[Tensor], held: list[Tensor], model: ModelConfig) -> tuple[float, float, float]:
    """Return the last three fields of Balance.

    seen: [R] number of keys of each position, by sequence. held: positions by rank.
    """
    attended_pairs = [[int(of_sequence[positions].sum()) for positions in held] for of_sequence in seen]
    flops = [[sum(count_step_flops(model, len(held[0]), count, 0)) for count in counts] for counts in attended_pairs]
    ratios = [max(counts) / mean(counts) for counts in attended_pairs]
    return mean(ratios), max(ratios), mean(max(values) / mean(values) for values in flops)


def split_positions(length: int, doubled: bool, size: int, split: str, block_size: int) -> list[Tensor]:
    """Return the positions of every rank."""
    if split == "contiguous":
        positions = torch.arange(2 * length if doubled else length)
        return list(positions.view(-1, size, length // size).transpose(0, 1).flatten(1))
    min_chunk_length = MIN_CHUNK_LENGTH if split == "rounds" else length
    shards = [ContextShard(rank, size, None, block_size, min_chunk_length) for rank in range(size)]
    return [shard.find_positions(length, doubled) for shard in shards]


def build_layout(documents: Documents, length: int, block_size: int, doubled: bool, seed: int) -> SequenceLayout:
    """Lay out one sequence as the packer does: in whole blocks, with block padding, where there is noise."""
    form = SequenceForm(length, block_size, block_size if doubled else 1)
    lengths = documents.draw(length, form.alignment, np.random.default_rng(seed))
    tokens = np.zeros(lengths.sum(), dtype=np.int64)
    segments = Segments(tokens, lengths, np.arange(len(lengths)), np.zeros(len(lengths), dtype=bool))
    return lay_out(segments, form, block_padding_token_id=0).layout


def print_balance(console: Console, found: list[Balance]) -> None:
    """Print one line per stage, kind of documents and size."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("stage", "documents", "CP"):
        table.add_column(column, justify="right" if column == "CP" else "left")
    for split in SPLITS:
        for column in COLUMNS:
            table.add_column(f"{split}\n{column}", justify="right")
    lines: dict[tuple[str, str, int], list[str]] = {}
    for item in found:
        numbers = [f"{value:.3f}" for value in (item.attended_pairs, item.flops)]
        lines.setdefault((item.stage, item.documents, item.size), []).extend(numbers)
    for (stage, documents, size), numbers in lines.items():
        table.add_row(stage, documents, str(size), *numbers)
    console.print("Fullest rank over the mean: attended pairs, FLOPs of the layers")
    console.print(table)


def as_dictionaries(found: list[Balance]) -> list[dict[str, str | int | float]]:
    """Return the balances as records for JSON."""
    return [asdict(item) for item in found]


def main() -> None:
    """Print the table."""
    parser = OneLineParser(
        prog="python -m tests.bench.joint.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--length", type=count, default=LENGTH, help="tokens of a sequence; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.length % (unit := 2 * max(SIZES) * BLOCK_SIZE):
        parser.error(
            f"--length {arguments.length} is not a multiple of {unit}: two chunks of whole blocks on every rank"
        )
    print_balance(Console(width=100, highlight=False), simulate_balance(arguments.length))


if __name__ == "__main__":
    sys.exit(exit_status(main))
