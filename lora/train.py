"""Train a draft adapter: `torchrun --nproc_per_node=N -m lora.train checkpoint=DIR data=PATH`.

Composes the configuration, checks its rules and hands dataclasses to run_drafter. torch, peft and deepspeed are
imported only once the configuration is known to be good.
"""

import sys

from conf.composition.command_line import run_composed
from conf.composition.trees import DRAFTER_TREE
from conf.rules.drafter import check_drafter_rules
from conf.schema.drafter import DrafterConfig
from conf.system.entry import quiet_libraries
from pretrain.run.stop import listen

USAGE = """\
Train the draft adapter of a checkpoint: a LoRA on every o_proj that is on only while drafting, so that linear
self-speculation accepts longer drafts and still gives the text of autoregressive decoding.

usage: python -m lora.train checkpoint=DIR data=PATH [experiment=NAME] [key=value ...] [--cfg job [--resolve]] [--help]
       torchrun --nproc_per_node=N -m lora.train ...

examples:
  # a released checkpoint, your own prompts, one GPU: the model responds, the adapter learns to draft its responses
  python -m lora.train checkpoint=Nemotron-Labs-Diffusion-8B data=questions.jsonl responses.source=greedy \\
      output=my_adapter
  # eight GPUs with sharded weights; weights and optimizer are offloaded for a model that would not fit
  torchrun --nproc_per_node=8 -m lora.train checkpoint=Nemotron-Labs-Diffusion-14B data=chats.jsonl \\
      output=my_adapter zero.stage=3 zero.offload_parameters=true zero.offload_optimizer=true
  # print the configuration without running it
  python -m lora.train checkpoint=DIR data=chats.jsonl --cfg job
  # measure the gain afterwards, on prompts that were not trained on
  python -m lora.evaluate Nemotron-Labs-Diffusion-8B --adapter my_adapter --prompts others.jsonl

Data are records {"messages": [...]} or {"text": ...} in .jsonl or .parquet files, or tokens that `make prepare-data`
wrote. With responses.source=greedy or sampled, the model responds to records of .jsonl files: {"prompt": ...},
{"messages": [...]} that end with the user's turn (a response after it is ignored), {"text": ...} to be continued. A
checkpoint that reads images responds to records with images, too: paths or base64 in a message's content, or "images".
Without output=... the adapter lands in DIR/linear_spec_lora, where decoding finds it; an adapter that is already there
is not replaced. The same command again continues the run (resume=auto).
"""


def _run(config: DrafterConfig, world_size: int) -> int:
    """Check the rules, then train. Returns: the exit status. Raises: UserError for whatever the user can fix."""
    check_drafter_rules(config, world_size)
    quiet_libraries("torch.distributed", "deepspeed", "transformers")

    from lora.drafter.build import run_drafter  # imports torch, transformers, peft and deepspeed

    return run_drafter(config)


def main() -> None:
    """Run the command line and exit with the status of the training (pretrain/run/stop.py)."""
    listen()
    sys.exit(run_composed(DRAFTER_TREE, USAGE, _run))


if __name__ == "__main__":
    main()
