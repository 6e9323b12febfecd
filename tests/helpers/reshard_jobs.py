"""Loads a checkpoint into a live sharded model and saves it again with megatron-core's own writer.

`torchrun ... -m tests.helpers.reshard_jobs JOBS.json`: a list of {source, run, layout, dtype}. source: Hugging Face
directory or step directory. run: run folder to write step 0 into. layout: name in tests/helpers/layouts.py.
"""

from typing import Any

from tests.helpers.layouts import LAYOUTS
from tests.helpers.worker import take_jobs


def main() -> None:
    from megatron.core import parallel_state

    from model.megatron import cpu

    cpu.install()
    for job in take_jobs():
        reshard(**job)
        parallel_state.destroy_model_parallel()


def reshard(source: str, run: str, layout: str, dtype: str) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from conf.composition.compose import compose_layout
    from conf.schema import Dtype, PrecisionConfig
    from model.checkpoint.layout import step_directory
    from model.convert.checkpoint_info import is_hf_directory, read_checkpoint_info
    from model.convert.load_weights import load_hf_weights, load_megatron_weights
    from model.megatron.build import build_model_chunks
    from model.megatron.shards import iterate_local_shards

    parallel, precision = compose_layout(LAYOUTS[layout]), PrecisionConfig(dtype=Dtype(dtype))
    virtual = parallel.virtual_pipeline_parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = read_checkpoint_info(source).model
    chunks: list[Any] = build_model_chunks(model, parallel, precision, loss_chunk_rows=64)
    load: Any = load_hf_weights if is_hf_directory(source) else load_megatron_weights
    load(chunks, source, model)
    assert {str(parameter.dtype) for chunk in chunks for parameter in chunk.parameters()} == {
        "torch.bfloat16" if dtype == "bf16" else "torch.float32"
    }
    step = step_directory(run, 0)
    if dist.get_rank() == 0:
        step.mkdir(parents=True)
    dist.barrier()
    state = {str(i): shard for i, shard in enumerate(iterate_local_shards(chunks))}
    dist_checkpointing.save(state, str(step), TorchDistSaveShardedStrategy())


if __name__ == "__main__":
    main()
