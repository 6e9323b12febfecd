"""The bare matmuls of the joint step's useful work.

Useful work is that of the FLOP count (pretrain/costs.py): every matmul with a weight over the positions it is
needed for, and attention over the attended pairs, once forward and twice backward. All positions go through all
of every layer, though those without loss need not in the last (model/megatron/tri_mode.py): economies.py says how
much that is. Outputs exist beforehand; each matmul has the shape that computes it fastest here (a tile of the
vocabulary at a time).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from conf.schema import ModelConfig, Objective
from tests.bench.joint.cases import Case, build_input

# The head's tiles. 256 positions take 2 to 3 % longer; 1024 columns 3 %: rows 4 KiB apart share sets of the cache.
TILE_POSITIONS, TILE_COLUMNS = 768, 960


@dataclass(frozen=True)
class Work:
    """Work of a step: num_positions go through the layers, scored_positions through the head."""

    num_positions: int
    attended_pairs: int
    scored_positions: int


def count_useful_work(case: Case) -> Work:
    """Count the work of the joint step."""
    counts = build_input(case, Objective.joint).counts
    return Work(counts.positions, counts.attended_pairs, counts.clean + counts.masked)


def count_reference_work(case: Case) -> Work:
    """Count the work of the straightforward formulation: all keys for all positions, all positions through the head."""
    num_positions = 2 * case.sequence_length
    return Work(num_positions, num_positions**2, num_positions)


def build_matmuls(model: ModelConfig, work: Work) -> list[Callable[[], object]]:
    """Build layers with attention, and the head; call each for one forward and backward of it."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    widths = [(hidden, model.query_width + 2 * model.key_value_width), (model.query_width, hidden)]
    widths += [(hidden, 2 * ffn), (ffn, hidden)]
    linears = [_Linear(work.num_positions, inputs, outputs) for inputs, outputs in widths]
    attention = _Attention(
        model.num_attention_heads, work.num_positions, work.attended_pairs // work.num_positions, model.head_dim
    )
    layer = [*linears, attention]
    return [
        lambda: [matmul() for matmul in layer for _ in range(model.num_layers)],
        _Head(model, work.scored_positions),
    ]


class _Linear:
    def __init__(self, num_positions: int, inputs: int, outputs: int) -> None:
        self.x, self.y = torch.randn(num_positions, inputs), torch.randn(num_positions, outputs)
        self.weight, self.grad = torch.randn(outputs, inputs), torch.zeros(outputs, inputs)

    def __call__(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)
        torch.mm(self.y, self.weight, out=self.x)
        torch.mm(self.y.t(), self.x, out=self.grad)
        self.x.fill_(1.0)  # repeated matmuls would overflow


class _Attention:
    """Every position with as many keys as positions see on average, in chunks of 128."""

    CHUNK = 128

    def __init__(self, heads: int, num_positions: int, keys: int, head_dim: int) -> None:
        self.query = torch.randn(heads, self.CHUNK, head_dim)
        self.key = torch.randn(heads, keys, head_dim)
        self.scores, self.output = torch.randn(heads, self.CHUNK, keys), torch.randn(heads, self.CHUNK, head_dim)
        self.grad = torch.randn(heads, keys, head_dim)
        self.num_chunks = num_positions // self.CHUNK

    def __call__(self) -> None:
        for _ in range(self.num_chunks):
            for _ in range(2):  # scores, and their gradient
                torch.bmm(self.query, self.key.transpose(1, 2), out=self.scores)
            for _ in range(2):  # output, and the query's gradient
                torch.bmm(self.scores, self.key, out=self.output)
            for _ in range(2):  # gradients of value and key
                torch.bmm(self.scores.transpose(1, 2), self.query, out=self.grad)


class _Head:
    def __init__(self, model: ModelConfig, num_scored: int) -> None:
        self.hidden = torch.randn(num_scored, model.hidden_size)
        self.weight = torch.randn(model.vocab_size, model.hidden_size)
        self.grad, self.grad_hidden = torch.zeros_like(self.weight), torch.zeros_like(self.hidden)
        self.logits = torch.empty(TILE_POSITIONS * min(TILE_COLUMNS, model.vocab_size))

    def __call__(self) -> None:
        weights, grads = self.weight.split(TILE_COLUMNS), self.grad.split(TILE_COLUMNS)
        for hidden, grad_hidden in zip(
            self.hidden.split(TILE_POSITIONS), self.grad_hidden.split(TILE_POSITIONS), strict=True
        ):
            for weight, grad in zip(weights, grads, strict=True):
                logits = self.logits[: len(hidden) * len(weight)].view(len(hidden), len(weight))
                torch.mm(hidden, weight.t(), out=logits)
                torch.mm(logits, weight, out=grad_hidden)
                torch.mm(logits.t(), hidden, out=grad)
