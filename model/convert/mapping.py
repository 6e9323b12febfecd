"""The one table between Hugging Face and Megatron names, used in both directions.

A TensorMapping states which Hugging Face tensors make up one Megatron tensor and how their rows interleave. Everything
else follows from it: names, shapes, the order of tensors in files, what is missing and what is left over.

Hugging Face names differ only in their prefix (see Spelling); a mapping holds the suffix. Megatron keys are those of
the distributed checkpoint: Transformer Engine names, onto which megatron-core maps its local layers, too. Tower and
projector of a model that reads images are transformers' own modules in both: `vision.tower` and `vision.projector`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from torch import Tensor

from conf.schema import ModelConfig


class Rule(Enum):
    """How the rows of Hugging Face tensors are arranged in the Megatron tensor.

    same: one tensor, unchanged. gate_up: all gate rows, then all up rows.
    query_key_value: for each key/value group its query heads, then its key head, then its value head.
    """

    same = "same"
    gate_up = "gate_up"
    query_key_value = "query_key_value"


HEAD = "head"  # stands for the vocabulary head, whose names have no common suffix
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class TensorMapping:
    """One line of the table, for all layers and sizes. Dimensions are (dotted) names of ModelConfig properties.

    tensor_parallel_axis: the axis that megatron-core splits over tensor-parallel ranks; None if replicated.
    """

    megatron: str
    hf: dict[str, tuple[str, ...]]
    tensor_parallel_axis: int | None
    rule: Rule = Rule.same


_LAYER = "decoder.layers.{layer}."

FIRST_TENSORS = (TensorMapping("embedding.word_embeddings.weight", {EMBEDDING: ("vocab_size", "hidden_size")}, 0),)
LAYER_TENSORS = (
    TensorMapping(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        {"layers.{layer}.input_layernorm.weight": ("hidden_size",)},
        None,
    ),
    TensorMapping(
        _LAYER + "self_attention.linear_qkv.weight",
        {
            "layers.{layer}.self_attn.q_proj.weight": ("query_width", "hidden_size"),
            "layers.{layer}.self_attn.k_proj.weight": ("key_value_width", "hidden_size"),
            "layers.{layer}.self_attn.v_proj.weight": ("key_value_width", "hidden_size"),
        },
        0,
        Rule.query_key_value,
    ),
    TensorMapping(
        _LAYER + "self_attention.linear_proj.weight",
        {"layers.{layer}.self_attn.o_proj.weight": ("hidden_size", "query_width")},
        1,
    ),
    TensorMapping(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        {"layers.{layer}.post_attention_layernorm.weight": ("hidden_size",)},
        None,
    ),
    TensorMapping(
        _LAYER + "mlp.linear_fc1.weight",
        {
            "layers.{layer}.mlp.gate_proj.weight": ("ffn_hidden_size", "hidden_size"),
            "layers.{layer}.mlp.up_proj.weight": ("ffn_hidden_size", "hidden_size"),
        },
        0,
        Rule.gate_up,
    ),
    TensorMapping(
        _LAYER + "mlp.linear_fc2.weight",
        {"layers.{layer}.mlp.down_proj.weight": ("hidden_size", "ffn_hidden_size")},
        1,
    ),
)
LAST_TENSORS = (
    TensorMapping("decoder.final_layernorm.weight", {"norm.weight": ("hidden_size",)}, None),
    TensorMapping("output_layer.weight", {HEAD: ("vocab_size", "hidden_size")}, 0),
)

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
VISION_PARTS = {TOWER: "vision.tower.", PROJECTOR: "vision.projector."}  # Hugging Face -> Megatron


def _vision_tensors(names: dict[str, tuple[str, ...]]) -> tuple[TensorMapping, ...]:
    """Return the mappings of tensors that are the same in both formats, and whole on every tensor-parallel rank."""
    parts = {name: next(part for part in VISION_PARTS if name.startswith(part)) for name in names}
    return tuple(
        TensorMapping(VISION_PARTS[parts[name]] + name.removeprefix(parts[name]), {name: dims}, None)
        for name, dims in names.items()
    )


_WIDTH = "vision.hidden_size"
_TOWER_LAYER = TOWER + "transformer.layers.{layer}."
FIRST_VISION_TENSORS = _vision_tensors(
    {
        TOWER + "patch_conv.weight": (_WIDTH, "vision.num_channels", "vision.patch_size", "vision.patch_size"),
        TOWER + "ln_pre.weight": (_WIDTH,),
    }
)
VISION_LAYER_TENSORS = _vision_tensors(
    {
        _TOWER_LAYER + "attention_norm.weight": (_WIDTH,),
        **{_TOWER_LAYER + f"attention.{one}_proj.weight": (_WIDTH, _WIDTH) for one in "qkvo"},
        _TOWER_LAYER + "ffn_norm.weight": (_WIDTH,),
        _TOWER_LAYER + "feed_forward.gate_proj.weight": ("vision.ffn_hidden_size", _WIDTH),
        _TOWER_LAYER + "feed_forward.up_proj.weight": ("vision.ffn_hidden_size", _WIDTH),
        _TOWER_LAYER + "feed_forward.down_proj.weight": (_WIDTH, "vision.ffn_hidden_size"),
    }
)
LAST_VISION_TENSORS = _vision_tensors(
    {
        PROJECTOR + "norm.weight": (_WIDTH,),
        PROJECTOR + "patch_merger.merging_layer.weight": (_WIDTH, "vision.merged_width"),
        PROJECTOR + "linear_1.weight": ("hidden_size", _WIDTH),
        PROJECTOR + "linear_2.weight": ("hidden_size", "hidden_size"),
    }
)


@dataclass(frozen=True)
class Spelling:
    """How one kind of Hugging Face checkpoint names its tensors: `body` + suffix, or `vision` + suffix, and `head`."""

    kind: str
    body: str
    head: str
    vision: str

    def name(self, suffix: str) -> str:
        """Return the full tensor name for a suffix of the table."""
        if suffix.startswith(tuple(VISION_PARTS)):
            return self.vision + suffix
        return self.head if suffix == HEAD else self.body + suffix


NLD = Spelling("tri-mode (NLD)", "encoder.", "diffusion_head.weight", "encoder.")
MINISTRAL_SPELLINGS = (
    Spelling("Ministral 3 with vision", "language_model.model.", "language_model.lm_head.weight", ""),
    Spelling("Ministral 3 with vision (transformers 5)", "model.language_model.", "lm_head.weight", "model."),
    Spelling("Ministral 3 text", "model.", "lm_head.weight", ""),
)
# Tower and projector of Ministral 3, in any spelling: not part of the text model, skipped and counted.
VISION_PREFIXES = tuple(prefix + part for prefix in ("", "model.") for part in VISION_PARTS)


@dataclass(frozen=True)
class TensorEntry:
    """A mapping for one layer of one model, with final names and shapes.

    hf: suffix -> shape, in the order of the fused rows.
    """

    megatron: str
    megatron_shape: tuple[int, ...]
    hf: dict[str, tuple[int, ...]]
    tensor_parallel_axis: int | None
    rule: Rule


def build_tensor_table(model: ModelConfig) -> list[TensorEntry]:
    """List every tensor of `model` in the order in which files are written."""
    return list(_entries(model))


def _entries(model: ModelConfig) -> Iterator[TensorEntry]:
    yield from (_entry(mapping, model, "") for mapping in FIRST_TENSORS)
    for layer in range(model.num_layers):
        yield from (_entry(mapping, model, str(layer)) for mapping in LAYER_TENSORS)
    yield from (_entry(mapping, model, "") for mapping in LAST_TENSORS)
    if model.vision is not None:
        yield from list_vision_entries(model)


def list_vision_entries(model: ModelConfig) -> Iterator[TensorEntry]:
    """List the tensors of the vision tower and of its projector in their order."""
    assert model.vision is not None
    yield from (_entry(mapping, model, "") for mapping in FIRST_VISION_TENSORS)
    for layer in range(model.vision.num_layers):
        yield from (_entry(mapping, model, str(layer)) for mapping in VISION_LAYER_TENSORS)
    yield from (_entry(mapping, model, "") for mapping in LAST_VISION_TENSORS)


def _entry(mapping: TensorMapping, model: ModelConfig, layer: str) -> TensorEntry:
    shapes = {
        suffix.replace("{layer}", layer): tuple(attrgetter(dim)(model) for dim in dims)
        for suffix, dims in mapping.hf.items()
    }
    first = next(iter(shapes.values()))
    fused = (sum(shape[0] for shape in shapes.values()), *first[1:])
    return TensorEntry(
        mapping.megatron.replace("{layer}", layer), fused, shapes, mapping.tensor_parallel_axis, mapping.rule
    )


def count_table_parameters(table: list[TensorEntry]) -> int:
    """Count the weights of a whole table, head included."""
    return sum(math.prod(entry.megatron_shape) for entry in table)


def split_views(fused: Tensor, entry: TensorEntry, model: ModelConfig) -> list[Tensor]:
    """Return views into the Megatron tensor, one per Hugging Face tensor of `entry`, with its elements in its order.

    `fused` is [rows, hidden]. The views of query, key and value are [groups, heads, head_dim, hidden]: reshape one to
    the Hugging Face shape to read it, copy a reshaped tensor into it to fill it.
    """
    if entry.rule is Rule.same:
        return [fused]
    if entry.rule is Rule.gate_up:
        return list(fused.split([shape[0] for shape in entry.hf.values()]))
    queries = model.num_attention_heads // model.num_key_value_heads
    grouped = fused.view(model.num_key_value_heads, queries + 2, model.head_dim, fused.shape[1])
    return list(grouped.split([queries, 1, 1], dim=1))
