"""Run a step of the draft adapter's training without a GPU: `python -m launch.simulate.drafter --model ministral3_8b`.

The model, its adapter, the blocks and the loss are lora.train's own, at full size on fake tensors, updated by torch's
AdamW as on one GPU under ZeRO 0. What ZeRO 1 to 3 shard is calculated from that: DeepSpeed's own parts ask the device.
"""

import argparse
import json
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from conf.composition.compose import compose_drafter_config, compose_size
from conf.rules.drafter import check_drafter_rules
from conf.schema.drafter import DrafterConfig
from conf.system.entry import OneLineParser, count, exit_status
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_machine import fake_machine
from launch.simulate.rank_report import GIB

WIDTH = 140
EXAMPLES = """examples:
  python -m launch.simulate.drafter --model ministral3_8b --gpus 8
  python -m launch.simulate.drafter --model ministral3_14b runtime.gradient_checkpointing=true train.micro_batch_size=4

Overrides are those of `python -m lora.train`; checkpoint and data need not be given.
"""


@dataclass(frozen=True)
class ShardedMemory:
    """Holds the peak of a step on one GPU under a level of ZeRO. base, adapter: weights. state: Adam's moments.

    ZeRO 0 holds all of it; 1 shards the state over GPUs, 2 the adapter's gradients too, 3 the weights too.
    """

    level: int
    base: float
    adapter: float
    gradients: float
    state: float
    passing: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.base + self.adapter + self.gradients + self.state + self.passing


def main() -> None:
    """Run the command; exit status 2 after one message if it cannot run like this."""
    parser = OneLineParser(
        prog="python -m launch.simulate.drafter",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for lora.train")
    parser.add_argument("--model", required=True, help="option of conf/model, such as ministral3_8b")
    parser.add_argument("--gpus", type=count, default=1, metavar="N", help="over which ZeRO shards (%(default)s)")
    parser.add_argument("--device", default="h100", choices=KINDS, help="kind of GPU (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    arguments = parser.parse_intermixed_args()
    sys.exit(exit_status(lambda: simulate_drafter(arguments)))


def simulate_drafter(arguments: argparse.Namespace) -> None:
    """Simulate the step and print the result. Raises: UserError."""
    given = arguments.overrides
    missing = [f"{key}={key}" for key in ("checkpoint", "data") if not any(one.startswith(f"{key}=") for one in given)]
    config = compose_drafter_config([*given, *missing])
    check_drafter_rules(config, arguments.gpus)
    recorded = simulate(config, arguments.model, arguments.device)
    levels = [shard(recorded, level, arguments.gpus) for level in range(4)]
    if arguments.json:
        described = [vars(level) | {"total": level.total} for level in levels]
        print(json.dumps({"step": recorded, "zero": described}))
        return
    print_levels(Console(width=WIDTH, highlight=False), config, levels, recorded, arguments.gpus)


def simulate(config: DrafterConfig, model: str, device: str) -> dict:
    """Return what drafter_work.py recorded. Raises: UserError if it cannot be simulated here."""
    compose_size([f"model={model}", "train.tokens=1e6"])  # names the nearest option if there is none of this name
    with fake_machine(device, config) as machine:
        report = machine.run("the step", ["launch.simulate.drafter_work"], model, device)
        return json.loads(report.read_text(encoding="utf-8"))


def shard(recorded: dict, level: int, num_gpus: int) -> ShardedMemory:
    """Return a GPU's bytes under a level of ZeRO, from those of one GPU that holds everything."""
    of_weights, of_gradients, of_state = (num_gpus if level >= least else 1 for least in (3, 2, 1))
    kinds = recorded["kinds"]
    lasting = sum(kinds[kind] for kind in ("weights", "adapter", "gradients", "optimizer"))
    return ShardedMemory(
        level=level,
        base=kinds["weights"] / of_weights,
        adapter=kinds["adapter"] / of_weights,
        gradients=kinds["gradients"] / of_gradients,
        state=kinds["optimizer"] / of_state,
        passing=recorded["peak"] - lasting,
    )


def print_levels(
    console: Console, config: DrafterConfig, levels: list[ShardedMemory], recorded: dict, num_gpus: int
) -> None:
    """Print the memory of each level of ZeRO, and what is alive at the peak."""
    from launch.simulate.tables import start_table

    train = config.train
    console.print(
        f"{recorded['trainable'] / 1e6:.1f}M trainable parameters; {train.micro_batch_size} x {train.sequence_length} "
        f"tokens, {train.blocks_per_sequence} blocks each; peak in {recorded['peak_module'] or 'small tensors'}"
    )
    parts = ["base", "adapter", "gradients", "state", "passing", "total"]
    table = start_table(f"GiB on each of {num_gpus} GPUs (ZeRO 1 to 3 calculated)", ["ZeRO"], parts)
    for memory in levels:
        style = "bold" if memory.level == config.zero.stage else ""
        table.add_row(str(memory.level), *(f"{getattr(memory, part) / GIB:.3f}" for part in parts), style=style)
    console.print(table)
    table = start_table("Passing tensors at the peak, layers together", ["module"], ["GiB"])
    for name, num_bytes in recorded["modules"].items():
        table.add_row(name, f"{num_bytes / GIB:.3f}")
    console.print(table)
    lines = ", ".join(sorted({question["line"] for question in recorded["questions"]})) or "nowhere"
    console.print(Text(f"\nwhere the host waits for its device in a microbatch: {lines}"))


if __name__ == "__main__":
    main()
