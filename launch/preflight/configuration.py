"""The rules between settings, for the number of ranks the job will have."""

from collections.abc import Iterator

from conf.rules import check_rules, data_parallel_size
from launch.preflight.findings import Finding, ok
from launch.preflight.subject import Subject


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Every rule that is broken, in one message."""
    config, world_size = subject.config, subject.world_size
    check_rules(config, world_size)
    parallel, copies = config.parallel, data_parallel_size(config, world_size)
    microbatches = config.train.global_batch_size // (config.train.micro_batch_size * copies)
    yield ok(
        f"world size {world_size} ({subject.nodes} x {subject.gpus_per_node}): TP{parallel.tensor_parallel} "
        f"PP{parallel.pipeline_parallel} DP{copies}; {config.num_steps} steps of {config.tokens_per_step} tokens, "
        f"{microbatches} microbatches of {config.train.micro_batch_size} x {config.data.sequence_length} per rank"
    )
