"""The bare matrix products of the joint step's useful work.

Useful work is that of the FLOP count (pretrain/costs.py): every product with a weight over the rows it is
needed for, and attention over the pairs that see each other, once forward and twice backward. All rows go through all
of every layer, though those without loss need not in the last (model/megatron/tri_mode.py): economies.py says how
much that is. Outputs exist beforehand; each product has the shape that computes it fastest here (a tile of the
vocabulary at a time).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from conf.schema import ModelConfig, Objective
from tests.bench.joint.cases import Case, build_input

# The head's tiles. 256 rows take 2 to 3 % longer; 1024 columns 3 %: rows 4 KiB apart share sets of the cache.
HEAD_ROWS, HEAD_COLUMNS = 768, 960


@dataclass(frozen=True)
class Work:
    """rows: through the layers. pairs: that see each other. scored_rows: through the head."""

    rows: int
    pairs: int
    scored_rows: int


def count_useful_work(case: Case) -> Work:
    """Of the joint step."""
    counts = build_input(case, Objective.joint).counts
    return Work(counts.positions, counts.attended_pairs, counts.clean + counts.masked)


def count_reference_work(case: Case) -> Work:
    """Of the straightforward formulation: all pairs of rows, all rows through the head."""
    rows = 2 * case.sequence_length
    return Work(rows, rows * rows, rows)


def build_products(model: ModelConfig, work: Work) -> list[Callable[[], object]]:
    """Layers, attention and head; call each for one forward and backward of it."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    widths = [(hidden, model.query_width + 2 * model.key_value_width), (model.query_width, hidden)]
    widths += [(hidden, 2 * ffn), (ffn, hidden)]
    linears = [_Linear(work.rows, inputs, outputs) for inputs, outputs in widths]
    attention = _Attention(model.num_attention_heads, work.rows, work.pairs // work.rows, model.head_dim)
    layer = [*linears, attention]
    return [lambda: [product() for product in layer for _ in range(model.num_layers)], _Head(model, work.scored_rows)]


class _Linear:
    def __init__(self, rows: int, inputs: int, outputs: int) -> None:
        self.x, self.y = torch.randn(rows, inputs), torch.randn(rows, outputs)
        self.weight, self.grad = torch.randn(outputs, inputs), torch.zeros(outputs, inputs)

    def __call__(self) -> None:
        torch.mm(self.x, self.weight.t(), out=self.y)
        torch.mm(self.y, self.weight, out=self.x)
        torch.mm(self.y.t(), self.x, out=self.grad)
        self.x.fill_(1.0)  # products of products would overflow


class _Attention:
    """Every row with as many keys as rows see on average, in pieces of 128 rows."""

    PIECE = 128

    def __init__(self, heads: int, rows: int, keys: int, head_dim: int) -> None:
        self.query = torch.randn(heads, self.PIECE, head_dim)
        self.key = torch.randn(heads, keys, head_dim)
        self.scores, self.output = torch.randn(heads, self.PIECE, keys), torch.randn(heads, self.PIECE, head_dim)
        self.grad = torch.randn(heads, keys, head_dim)
        self.pieces = rows // self.PIECE

    def __call__(self) -> None:
        for _ in range(self.pieces):
            for _ in range(2):  # scores, and their gradient
                torch.bmm(self.query, self.key.transpose(1, 2), out=self.scores)
            for _ in range(2):  # output, and the query's gradient
                torch.bmm(self.scores, self.key, out=self.output)
            for _ in range(2):  # gradients of value and key
                torch.bmm(self.scores.transpose(1, 2), self.query, out=self.grad)


class _Head:
    def __init__(self, model: ModelConfig, rows: int) -> None:
        self.hidden = torch.randn(rows, model.hidden_size)
        self.weight = torch.randn(model.vocab_size, model.hidden_size)
        self.grad, self.grad_hidden = torch.zeros_like(self.weight), torch.zeros_like(self.hidden)
        self.logits = torch.empty(HEAD_ROWS * min(HEAD_COLUMNS, model.vocab_size))

    def __call__(self) -> None:
        weights, grads = self.weight.split(HEAD_COLUMNS), self.grad.split(HEAD_COLUMNS)
        for hidden, grad_hidden in zip(self.hidden.split(HEAD_ROWS), self.grad_hidden.split(HEAD_ROWS), strict=True):
            for weight, grad in zip(weights, grads, strict=True):
                logits = self.logits[: len(hidden) * len(weight)].view(len(hidden), len(weight))
                torch.mm(hidden, weight.t(), out=logits)
                torch.mm(logits, weight, out=grad_hidden)
                torch.mm(logits.t(), hidden, out=grad)
