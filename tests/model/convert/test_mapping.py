"""The table names exactly transformers' tensors, and its row rules are those written out by hand."""

import torch
from transformers import Ministral3ForCausalLM

from model.convert.mapping import (
    HEAD,
    MINISTRAL_SPELLINGS,
    NLD,
    Rule,
    build_tensor_table,
    count_table_parameters,
    split_views,
)
from tests.helpers.tiny_checkpoints import make_text_config, tiny_model_config

MODEL = tiny_model_config()
TABLE = build_tensor_table(MODEL)
TEXT = MINISTRAL_SPELLINGS[2]


def find(ending):
    return next(entry for entry in TABLE if entry.megatron.endswith(ending))


def test_names_and_shapes_are_those_of_transformers():
    expected = Ministral3ForCausalLM(make_text_config(MODEL, tied=False)).state_dict()
    ours = {TEXT.name(suffix): shape for entry in TABLE for suffix, shape in entry.hf.items()}
    assert ours == {name: tuple(value.shape) for name, value in expected.items()}
    assert count_table_parameters(TABLE) == sum(value.numel() for value in expected.values())


def test_an_export_has_nine_tensors_per_layer_and_three_more():
    names = [NLD.name(suffix) for entry in TABLE for suffix in entry.hf]
    assert len(names) == len(set(names)) == 9 * MODEL.num_layers + 3
    assert {"encoder.embed_tokens.weight", "encoder.norm.weight", "diffusion_head.weight"} <= set(names)


def test_every_suffix_has_one_name_in_each_spelling():
    assert [spelling.name(HEAD) for spelling in MINISTRAL_SPELLINGS] == [
        "language_model.lm_head.weight",
        "lm_head.weight",
        "lm_head.weight",
    ]
    assert [spelling.name("norm.weight") for spelling in MINISTRAL_SPELLINGS] == [
        "language_model.model.norm.weight",
        "model.language_model.norm.weight",
        "model.norm.weight",
    ]


def test_query_key_value_rows_go_group_by_group():
    entry = find("layers.0.self_attention.linear_qkv.weight")
    query, key, value = (torch.randn(shape) for shape in entry.hf.values())
    rows = []
    heads_per_group = MODEL.num_attention_heads // MODEL.num_key_value_heads
    for group in range(MODEL.num_key_value_heads):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            rows.append(query[head * MODEL.head_dim : (head + 1) * MODEL.head_dim])
        rows += [part[group * MODEL.head_dim : (group + 1) * MODEL.head_dim] for part in (key, value)]
    fused = torch.cat(rows)
    assert tuple(fused.shape) == entry.megatron_shape
    for view, part in zip(split_views(fused, entry, MODEL), (query, key, value), strict=True):
        assert torch.equal(view.reshape(part.shape), part)


def test_gate_rows_come_before_up_rows():
    entry = find("layers.1.mlp.linear_fc1.weight")
    gate, up = (torch.randn(shape) for shape in entry.hf.values())
    assert list(entry.hf) == ["layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight"]
    for view, part in zip(split_views(torch.cat([gate, up]), entry, MODEL), (gate, up), strict=True):
        assert torch.equal(view, part)


def test_views_share_memory_with_the_fused_tensor():
    for entry in TABLE:
        fused = torch.zeros(entry.megatron_shape)
        for view in split_views(fused, entry, MODEL):
            view.fill_(1)
        assert bool(fused.all()), entry.megatron


def test_only_fused_rows_use_a_rule():
    assert {entry.rule for entry in TABLE if len(entry.hf) == 1} == {Rule.same}
