"""Where the run would begin: its newest checkpoint, the weights of init_from, or fresh ones."""

from collections.abc import Iterator

from launch.preflight.findings import Finding, ok, warning
from launch.preflight.subject import Subject


def check_start(subject: Subject) -> Iterator[Finding]:
    """The trainer's own decision, with its messages: another model, tokenizer, stage, data; damaged checkpoints."""
    from pretrain.resume.start import find_start

    config = subject.config
    assert subject.data is not None
    start = subject.start = find_start(config, subject.data)
    if start.step_dir is not None:
        left = int(config.train.tokens) - start.state.tokens_seen
        where = f"resumes {start.step_dir} at step {start.state.step}"
        if left < config.tokens_per_step:
            yield warning(
                f"{where}, where the run is complete: raise train.tokens to continue it, or choose a run.name"
            )
        else:
            yield ok(f"{where}; {left // config.tokens_per_step} steps are left; the start compares its checksums")
        for line in start.describe_changes():
            yield ok(line)
    elif start.weights is not None:
        yield ok(f"weights from {start.weights}")
    else:
        yield ok("fresh weights (no init_from, no checkpoint in the run folder)")
