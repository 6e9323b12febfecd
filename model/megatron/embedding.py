"""Embed words, split over the vocabulary, with a gradient that goes straight into megatron-core's gradient buffer.

torch's own backward makes a gradient of the whole vocabulary, [V, H], for the few words that a batch uses, and
megatron-core then adds all of it to its buffer: at vocabulary 131072 that is 5 % of the small step of tests/bench/joint
and half of its memory. Shapes: B batch, R positions, H hidden size, V/T words of this tensor-parallel rank.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.megatron.operators import find_main_gradient, mark_added, stand_in_gradient


class Embedding(LanguageModelEmbedding):
    """megatron-core's embedding with our lookup and without positions (model/attention/rotation.py handles those)."""

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size, max_sequence_length=0, position_embedding_type="none")
        self.word_embeddings = WordEmbedding(
            vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,  # type: ignore[arg-type]
            reduce_scatter_embeddings=self.reduce_scatter_embeddings,
            config=config,
            tp_group=self.tp_group,  # type: ignore[arg-type]
        )


class WordEmbedding(VocabParallelEmbedding):
    """megatron-core's word embedding with the lookup replaced."""

    def forward(self, input_: Tensor) -> Tensor:
        """Map tokens [B, R] to [B, R, H], or to [R / T, B, H] under sequence parallelism."""
        group: Any = self.tp_group
        size = group.size()
        tokens = input_ - self.vocab_start_index
        is_here = (tokens >= 0) & (tokens < len(self.weight)) if size > 1 else None
        hidden = _Lookup.apply(self.weight, tokens, is_here)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(hidden.transpose(0, 1).contiguous(), group=group)
        return reduce_from_tensor_model_parallel_region(hidden, group=group) if size > 1 else hidden


class _Lookup(torch.autograd.Function):
    """Looks up words in a weight; zeros where is_here [B, R] is given and False."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, is_here: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(tokens, is_here)
        if is_here is None:
            return torch.nn.functional.embedding(tokens, weight)
        return torch.nn.functional.embedding(tokens * is_here, weight) * is_here[..., None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens, is_here = ctx.saved_tensors
        tokens, grad = tokens.flatten(), grad.flatten(0, 1)
        if is_here is not None:
            # For other ranks' tokens zeros are added, spread over the weight: leaving them out would make the CPU wait
            # for the device to count them.
            is_here, spread = is_here.flatten(), torch.arange(len(tokens), device=tokens.device) % len(ctx.weight)
            tokens, grad = torch.where(is_here, tokens, spread), grad * is_here[:, None]
        weight, total = ctx.weight, find_main_gradient(ctx.weight)
        if total is None:
            own = torch.zeros_like(weight)
            return own.index_put_((tokens,), grad, accumulate=True), None, None
        # index_add_ would add in another order in every run on a GPU, which changes the sums' last bits.
        total.index_put_((tokens,), grad.to(total.dtype), accumulate=True)
        mark_added(weight)
        return stand_in_gradient(weight), None, None
