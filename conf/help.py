"""What `python -m pretrain.train --help` prints; Hydra's own help loads every plugin and takes three times as long."""

from omegaconf import OmegaConf

from conf.compose import compose_groups
from conf.explain import CONF_DIR, group_options, groups

USAGE = """\
Train a tri-mode language model: autoregressive (AR) or joint AR + block-diffusion stage.

usage: python -m pretrain.train [group=option ...] [key=value ...] [--cfg job [--resolve]] [--help]
       torchrun --nproc_per_node=N -m pretrain.train ...

examples:
  # what would run, without running it
  python -m pretrain.train experiment=nld_8b_joint --cfg job
  # a toy on two CPU processes
  torchrun --nproc_per_node=2 -m pretrain.train model=tiny parallel=tp2 runtime=cpu precision=fp32 \\
      data.train=DIR/train data.tokenizer=DIR/tokenizer data.sequence_length=192 \\
      train.tokens=1e6 train.global_batch_size=8
  # the joint stage of the 8B on H100 nodes, from the AR run's weights
  torchrun --nnodes=32 --nproc_per_node=8 -m pretrain.train experiment=nld_8b_joint \\
      data.train=DIR/train data.heldout=DIR/heldout data.tokenizer=DIR/tokenizer

The same command again continues the run (resume=auto), under any parallel=... A new stage takes weights only, from
a Hugging Face directory or another run: init_from=...
"""


def help_text(overrides: list[str]) -> str:
    """Usage, every group with its options, every key with its value under `overrides`. Raises ConfigError."""
    return (
        f"{USAGE}\ngroups (group=option):\n{_list_groups()}\nkeys (key=value; ??? must be given):\n{_keys(overrides)}"
    )


def describe_option(group: str, option: str) -> str:
    """The first comment in the option's YAML file that is not a Hydra directive."""
    lines = (CONF_DIR / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)
    return next(comments, "")


def _list_groups() -> str:
    lines = []
    for group in groups():
        lines.append(f"  {group}")
        lines += [f"    {option:<18} {describe_option(group, option)}" for option in group_options(group)]
    return "\n".join(lines) + "\n"


def _keys(overrides: list[str]) -> str:
    text = OmegaConf.to_yaml(compose_groups(overrides))
    return "".join(f"  {line}\n" for line in text.splitlines()) + "Meaning and unit of every key: conf/schema/*.py\n"
