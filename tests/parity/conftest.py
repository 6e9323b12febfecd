"""One process with megatron-core's groups, for tests that compare a live model with transformers."""

from collections.abc import Iterator

import pytest

from conf.schema import Device, ParallelConfig, RuntimeConfig
from pretrain.run.model_parallel import distributed_session
from pretrain.run.process_group import Ranks


@pytest.fixture(scope="module")  # other modules of the same worker start groups of their own
def ranks() -> Iterator[Ranks]:
    """Start a gloo process group of one rank."""
    with distributed_session(ParallelConfig(), RuntimeConfig(device=Device.auto), seed=0) as ranks:
        yield ranks
