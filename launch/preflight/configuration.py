"""The rules between settings, for the number of ranks the job will have."""

from collections.abc import Iterator

from conf.rules.run import check_rules, num_microbatches
from launch.preflight.findings import Finding, ok
from launch.preflight.subject import Subject


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Every rule that is broken, in one message."""
    config, world_size = subject.config, subject.world_size
    check_rules(config, world_size)
    layout, microbatches = config.parallel.describe(world_size), num_microbatches(config, world_size)
    yield ok(
        f"world size {world_size} ({subject.nodes} x {subject.gpus_per_node}): {layout}; {config.num_steps} steps of "
        f"{config.tokens_per_step} tokens, {microbatches} microbatches of {config.train.micro_batch_size} x "
        f"{config.data.sequence_length} per rank"
    )
