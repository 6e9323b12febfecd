"""A step builds one BlockMask per layout, whatever the number of layers, and none for a layout it has met."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention

from conf.schema import AttentionBackend, Device, Dtype, ModelConfig, ParallelConfig, PrecisionConfig, RuntimeConfig
from data_pipeline.batch import SequenceLayout
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from pretrain.run.model_parallel import distributed_session
from tests.model.attention.test_backends import build_packed_layout

MODEL = ModelConfig("toy", 3, 32, 48, 4, 2, 16, 128)


def test_a_forward_builds_its_block_mask_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = flex_attention.create_block_mask
    monkeypatch.setattr(
        flex_attention, "create_block_mask", lambda *args, **options: built.append(1) or original(*args, **options)
    )
    plans = PlanBuilder(MODEL, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    plans.backend = AttentionBackend.flex  # refused on the CPU, where it has no backward: here nothing goes back
    regular, packed = build_regular_layout(64, 16), build_packed_layout([[[64], [32]], [[64], [32]]])

    def count(layout: SequenceLayout) -> int:
        """Count BlockMasks that one forward through all layers builds."""
        built.clear()
        tokens = torch.zeros(len(layout.position_ids), 2 * layout.sequence_length, dtype=torch.int64)
        with torch.no_grad():
            chunk(tokens, plans.build(layout, doubled=True))
        return len(built)

    runtime = RuntimeConfig(device=Device.auto)
    with distributed_session(ParallelConfig(), runtime, seed=0) as ranks:
        (chunk,) = build_model_chunks(MODEL, ParallelConfig(), PrecisionConfig(Dtype.fp32), runtime.loss_chunk_rows)
        initialise_weights([chunk], MODEL, seed=0)
        assert ranks.device.type == "cpu"
        assert [count(regular), count(regular)] == [1, 0], "a regular layout is cached"
        assert [count(packed), count(packed)] == [1, 1], "documents are laid out anew in every batch"
        assert count(build_regular_layout(128, 16)) == 1
