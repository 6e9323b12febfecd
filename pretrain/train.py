"""Entry of the trainer: `torchrun --nproc_per_node=N -m pretrain.train [group=option ...] [key=value ...]`.

Composes the configuration, checks its rules and hands dataclasses to run_training. torch is imported only once the
configuration is known to be good, so that --help, --cfg job and every configuration error answer at once.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.compose import CONFIG_NAME, register_schema, to_run_config
from conf.errors import UserError
from conf.explain import explain
from conf.help import help_text
from conf.rules import check_rules
from conf.schema import RunConfig
from conf.sources import allow_new_keys

EXIT_USER_ERROR = 2
SECONDS_FOR_RANK_0 = 10.0  # longer than ranks drift apart while they import and read files
WANTS_TRACEBACK = os.environ.pop("HYDRA_FULL_ERROR", "") == "1"


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name=CONFIG_NAME)
def compose_and_run(composed: DictConfig) -> None:
    """What Hydra calls with the composed configuration."""
    os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        run(to_run_config(composed))
    except UserError as error:
        _exit_with(error)


def run(config: RunConfig) -> None:
    """Check the rules, then train. Raises UserError for whatever the user can mend."""
    check_rules(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if not sys.warnoptions:
        _quiet_libraries()

    from pretrain.trainer import run_training  # imports torch and megatron-core

    run_training(config)


def _quiet_libraries() -> None:
    """Hide what libraries tell their own developers, on every rank, of choices made here; -W default shows it."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\b")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Turn what the user can mend into one message and exit status 2; HYDRA_FULL_ERROR=1 shows the traceback too."""
    register_schema()
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text([word for word in sys.argv[1:] if not word.startswith("-")]))
            return
        sys.argv[1:] = allow_new_keys(sys.argv[1:])
        os.environ["HYDRA_FULL_ERROR"] = "1"  # while composing: Hydra raises its errors here instead of printing them
        compose_and_run()
    except UserError as error:
        _exit_with(error)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        if "HYDRA_FULL_ERROR" not in os.environ:  # composing had succeeded: a defect, not a wrong override
            raise
        _exit_with(explain(error))


def _exit_with(error: UserError) -> NoReturn:
    """Print once: rank 0 at once; another rank only if rank 0 has not ended the job in the meantime."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    if WANTS_TRACEBACK:
        traceback.print_exception(error)
    print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
