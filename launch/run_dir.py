"""Print the run folder of a command: `WORLD_SIZE=16 python -m launch.run_dir pretrain.train [overrides]`.

The launchers call it before the first rank starts, because they put logs into that folder. It imports no torch, so a
mistake in the overrides is one message before a GPU is occupied, as is a WORLD_SIZE that does not fit the layout.
"""

import os
import sys

from conf.composition.command_line import run_composed
from conf.composition.trees import DRAFTER_TREE, RUN_TREE
from conf.rules.drafter import check_drafter_rules
from conf.rules.run import check_rules
from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.entry import OneLineParser


def main() -> None:
    """Print one line and exit with 0, or print one message and exit with 2."""
    parser = OneLineParser(prog="python -m launch.run_dir", description="Print the run folder of a command.")
    parser.add_argument("module", choices=("pretrain.train", "lora.train"), help="module that will run")
    parser.add_argument("overrides", nargs="...", help="its command line")
    arguments = parser.parse_args()
    sys.argv[1:] = arguments.overrides  # where Hydra reads them
    if arguments.module == "pretrain.train":
        sys.exit(run_composed(RUN_TREE, "", _print_run_dir))
    sys.exit(run_composed(DRAFTER_TREE, "", _print_drafter_dir))


def _print_run_dir(config: RunConfig, world_size: int) -> None:
    if "WORLD_SIZE" in os.environ:
        check_rules(config, world_size)
    print(config.run.dir)


def _print_drafter_dir(config: DrafterConfig, world_size: int) -> None:
    if "WORLD_SIZE" in os.environ:
        check_drafter_rules(config, world_size)
    print(config.run.dir)


if __name__ == "__main__":
    main()
