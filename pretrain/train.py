"""Starts the trainer: `torchrun --nproc_per_node=N -m pretrain.train [group=option ...] [key=value ...]`.

Composes the configuration, checks its rules and hands dataclasses to run_training. torch is imported only once the
configuration is known to be good, so that --help, --cfg job and every configuration error answer at once.
"""

import sys

from conf.composition.command_line import run_composed
from conf.composition.trees import RUN_TREE
from conf.rules.run import check_rules
from conf.schema import RunConfig
from conf.system.entry import quiet_libraries
from pretrain.run.stop import listen

USAGE = """\
Train a tri-mode language model: the autoregressive (AR), joint AR + block-diffusion or instruct (SFT) stage.

usage: python -m pretrain.train [group=option ...] [key=value ...] [--cfg job [--resolve]] [--help]
       torchrun --nproc_per_node=N -m pretrain.train ...

examples:
  # what would run, without running it
  python -m pretrain.train experiment=nld_8b_joint --cfg job
  # a toy on two CPU processes
  torchrun --nproc_per_node=2 -m pretrain.train model=tiny parallel.tensor_parallel=2 runtime=cpu precision=fp32 \\
      data.train=DIR/train data.tokenizer=DIR/tokenizer data.sequence_length=192 \\
      train.tokens=1e6 train.global_batch_size=8
  # the joint stage of the 8B on H100 nodes, from the AR run's weights
  torchrun --nnodes=32 --nproc_per_node=8 -m pretrain.train experiment=nld_8b_joint \\
      data.train=DIR/train data.heldout=DIR/heldout data.tokenizer=DIR/tokenizer

The same command again continues the run (resume=auto), under any parallel=... A new stage takes weights only, from
a Hugging Face directory or another run: init_from=...
"""


def train(config: RunConfig, world_size: int) -> int:
    """Check the rules, train, and return the exit status. Raises: UserError for whatever the user can fix."""
    check_rules(config, world_size)
    quiet_libraries("torch.distributed")

    from pretrain.assemble import run_training  # imports torch and megatron-core

    return run_training(config)


def main() -> None:
    """Exit with the status of the run; see run_composed and pretrain/run/stop.py."""
    listen()
    sys.exit(run_composed(RUN_TREE, USAGE, train))


if __name__ == "__main__":
    main()
