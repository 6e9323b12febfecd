"""A step builds one BlockMask per layout, whatever the number of layers, and kernels compile once for all layouts."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from torch._dynamo.testing import CompileCounter

from conf.schema import AttentionBackend, Device, Dtype, ModelConfig, ParallelConfig, PrecisionConfig, RuntimeConfig
from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.flex import build_flex_attention
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout, find_visible_keys
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from pretrain.run.model_parallel import distributed_session
from tests.helpers.packed import pack_chats
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


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_flex_attention_compiles_once_for_all_packed_texts_and_once_more_for_chats(
    num_sequences: int, doubled: bool
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    kernel = torch.compile(flex_attention.flex_attention, dynamic=False, backend=counter)
    length = 64 * (2 if doubled else 1)
    query, key = (torch.randn(num_sequences, heads, length, 16) for heads in (4, 2))
    texts = [[[64]], [[32], [32]], [[9], [40]], [[5], [7], [1], [16]]]
    chats = [[[20, 30]], [[3, 12], [5, 16]], [[1, 1, 1, 1]]]

    def run(documents: list[list[int]], others: list[list[int]]) -> None:
        layout = pack_chats([documents, others][:num_sequences], SequenceForm(64, 8, 8)).layout
        block_mask = build_flex_attention(find_visible_keys(layout, doubled)).block_mask
        kernel(query, key, key, block_mask=block_mask, enable_gqa=True)

    for documents in texts:
        run(documents, texts[1])
    assert counter.frame_count == 1
    for documents in chats:
        run(documents, texts[2])
    assert counter.frame_count == 2, "padding between prompt and response is a table of the keys"
    for documents in texts + chats:
        run(documents, chats[1])
    assert counter.frame_count == 2
