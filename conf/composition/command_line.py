"""Command line of a program whose configuration Hydra composes: `[group=option] [key=value]`, --help, --cfg job.

The configuration is checked before the program's own code is imported, so that every mistake is reported at once.
"""

import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.composition.compose import prepare_overrides, refuse_hidden_layout, register_schema, to_config
from conf.composition.explain import explain
from conf.composition.help import help_text
from conf.composition.trees import CONFIG_NAME, ConfigTree
from conf.system.entry import exit_status, read_world_size

FULL_ERROR = "HYDRA_FULL_ERROR"


def run_composed[Config](tree: ConfigTree[Config], usage: str, run: Callable[[Config, int], int | None]) -> int:
    """Compose the configuration that the command line describes and call `run` with it and the number of ranks.

    Returns the exit status: the first one other than 0 that `run` returns. A UserError becomes one message and status
    2; HYDRA_FULL_ERROR=1 shows its traceback, too.
    usage: the beginning of --help. run: raises UserError for broken rules before it imports torch.
    """
    show_traceback = os.environ.pop(FULL_ERROR, "") == "1"
    return exit_status(
        lambda: _run_command(tree, usage, run),
        interrupted="interrupted: the same command continues from the newest checkpoint (resume=auto)",
        show_traceback=show_traceback,
    )


def _run_command[Config](tree: ConfigTree[Config], usage: str, run: Callable[[Config, int], int | None]) -> int:
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(help_text(tree, usage, [word for word in words if not word.startswith("-")]), end="")
        return 0
    for config in _compose_command_line(tree):
        if status := run(config, read_world_size()):
            return status
    return 0


def _compose_command_line[Config](tree: ConfigTree[Config]) -> list[Config]:
    """Compose the configurations that sys.argv asks for: one, none with --cfg, several with --multirun.

    Raises: UserError for what cannot be composed.
    """
    compositions: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=f"pkg://{tree.module}", config_name=CONFIG_NAME)
    def keep(composed: DictConfig) -> None:
        compositions.append(composed)

    register_schema(tree)
    sys.argv[1:] = prepare_overrides(sys.argv[1:], tree)
    os.environ[FULL_ERROR] = "1"  # while composing: Hydra raises its errors here instead of printing them
    try:
        keep()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, tree) from error
    finally:
        os.environ.pop(FULL_ERROR, None)
    for composed in compositions:
        refuse_hidden_layout(sys.argv[1:], composed, tree)
    return [to_config(config, tree) for config in compositions]
