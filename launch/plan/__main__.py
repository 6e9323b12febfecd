"""Predict what a run will take: `python -m launch.plan experiment=nld_8b_joint --gpus 256 [--search]`."""

import argparse
import json
import subprocess
import sys
from typing import Any

from rich.console import Console

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from conf.system.entry import OneLineParser, count, exit_status
from conf.system.errors import UserError
from launch.plan.as_json import describe_plan, describe_search
from launch.plan.hardware_profile import GIGA, HardwareProfile
from launch.plan.layout_plan import plan_layout
from launch.plan.search import search_layouts
from launch.plan.step_work import SequenceKind
from launch.plan.tables import print_plan, print_search

EXIT_DOES_NOT_FIT = 1
CHECKED = (
    "\n[bold]Simulated[/]: megatron-core's own layers instead of Transformer Engine's, in a step of few microbatches; "
    "what is planned beside is the same."
)
TERA = 1e12
WIDTH = 100
DEFAULT_IMAGE_SHARE = 0.5
EXAMPLES = """examples:
  python -m launch.plan experiment=nld_8b_joint --gpus 256
  python -m launch.plan experiment=nld_8b_sft parallel.tensor_parallel=4 train.micro_batch_size=1 --gpus 256 --mfu 0.35
  python -m launch.plan experiment=nld_14b_joint --gpus 512 --search
  python -m launch.plan experiment=nld_14b_joint --gpus 256 --check
  python -m launch.plan stage=joint model=ministral3_3b train.tokens=1e11 --gpus 8 --search --json

Data, tokenizer and start weights need not be given. Exit status: 0 fits, 1 does not fit, 2 cannot run like this.
"""


def main() -> None:
    """Run the command; exit status 1 if nothing fits, 2 with one message if a rule is broken."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    sys.exit(exit_status(lambda: run_plan(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; defaults of hardware options are those of HardwareProfile."""
    parser = OneLineParser(
        prog="python -m launch.plan",
        description="Memory per GPU, FLOPs, step time, communication and checkpoints of a run, before it starts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for pretrain.train: group=option, key=value"
    )
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit instead")
    parser.add_argument(
        "--check", action="store_true", help="simulate a rank of each kind, and compare (a minute; launch.simulate)"
    )
    parser.add_argument("--top", type=count, default=10, metavar="N", help="layouts that --search shows (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes and seconds, for programs")
    parser.add_argument(
        "--document-tokens",
        type=count,
        metavar="N",
        help="length of documents within a sequence, which do not see each other (default: one per sequence)",
    )
    parser.add_argument(
        "--scored-share",
        type=share,
        default=1.0,
        metavar="X",
        help="part of every document that may be scored, of chats the responses (%(default)g)",
    )
    parser.add_argument(
        "--image-share",
        type=share,
        metavar="X",
        help="part of all tokens that are features of images (default: 0.5 where the model reads images)",
    )
    parser.add_argument(
        "--image-side",
        type=count,
        default=SequenceKind().image_side,
        metavar="N",
        help="features along each side of an image, 28 pixels each (%(default)s)",
    )
    _add_hardware(parser.add_argument_group("hardware (defaults: nodes of 8 H100)"))
    return parser


def _add_hardware(group: argparse._ArgumentGroup) -> None:
    default = HardwareProfile()
    group.add_argument(
        "--mfu",
        type=share,
        default=default.mfu,
        metavar="X",
        help="share of the peak that is assumed while a GPU computes (%(default)g)",
    )
    options = {
        "--peak-tflops": (default.peak_flops / TERA, "dense bf16 peak of a GPU"),
        "--gpu-memory-gb": (default.memory_bytes / GIGA, "memory of a GPU"),
        "--reserve-gb": (default.reserve_bytes / GIGA, "part of it for CUDA, NCCL, workspaces and fragmentation"),
        "--hbm-gbs": (default.memory_bandwidth / GIGA, "GB/s a GPU reads and writes in its memory"),
        "--nvlink-gbs": (default.node_bandwidth / GIGA, "GB/s from a GPU to others of its node, one direction"),
        "--ib-gbs": (default.network_bandwidth / GIGA, "GB/s from a GPU to other nodes"),
        "--storage-gbs": (default.storage_bandwidth / GIGA, "GB/s that all ranks together write"),
    }
    for name, (value, meaning) in options.items():
        kind = not_negative if name == "--reserve-gb" else positive
        group.add_argument(name, type=kind, default=value, metavar="X", help=f"{meaning} (%(default)g)")
    group.add_argument("--gpus-per-node", type=count, default=default.gpus_per_node, metavar="N", help="(%(default)s)")


def positive(text: str) -> float:
    """Parse a command-line option that is a number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def not_negative(text: str) -> float:
    """Parse a command-line option that is zero or a positive number."""
    return 0.0 if float(text) == 0 else positive(text)


def share(text: str) -> float:
    """Parse a command-line option that is above zero and at most one."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give 0.4 for 40 %")
    return value


def _read_image_share(arguments: argparse.Namespace, config: RunConfig) -> float:
    """Return the share of image features. Raises UserError for images that the model does not read."""
    if config.model.vision is None:
        if arguments.image_share:
            raise UserError(f"--image-share: model={config.model.name} reads no images; leave it out")
        return 0.0
    return DEFAULT_IMAGE_SHARE if arguments.image_share is None else arguments.image_share


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan or search, print the result, and return the exit status. Raises UserError."""
    hardware = HardwareProfile(
        peak_flops=arguments.peak_tflops * TERA,
        mfu=arguments.mfu,
        gpus_per_node=arguments.gpus_per_node,
        memory_bytes=arguments.gpu_memory_gb * GIGA,
        reserve_bytes=arguments.reserve_gb * GIGA,
        memory_bandwidth=arguments.hbm_gbs * GIGA,
        node_bandwidth=arguments.nvlink_gbs * GIGA,
        network_bandwidth=arguments.ib_gbs * GIGA,
        storage_bandwidth=arguments.storage_gbs * GIGA,
    )
    config = compose_size(arguments.overrides)
    kind = SequenceKind(
        arguments.document_tokens, arguments.scored_share, _read_image_share(arguments, config), arguments.image_side
    )
    console = Console(width=WIDTH, highlight=False)
    if arguments.search and arguments.check:
        raise UserError("--check simulates one layout: give it without --search, with the keys of the layout")
    if arguments.search:
        search = search_layouts(config, arguments.gpus, hardware, kind)
        if arguments.json:
            print(json.dumps(describe_search(search, arguments.top), indent=1))
        else:
            print_search(console, search, config, arguments.gpus, hardware, arguments.top)
        return 0 if search.feasible else EXIT_DOES_NOT_FIT
    plan = plan_layout(config, arguments.gpus, hardware, kind)
    found = 0 if plan.fits else EXIT_DOES_NOT_FIT
    if arguments.json:
        checked, status = _check(arguments) if arguments.check else ({}, 0)
        print(json.dumps(describe_plan(plan) | checked, indent=1))
        return max(found, status)
    print_plan(console, plan)
    if arguments.check:
        console.print(CHECKED, soft_wrap=True)
        found = max(found, subprocess.run(_simulation(arguments), check=False).returncode)
    return found


def _check(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return what launch.simulate says of the plan, for JSON, and its exit status."""
    done = subprocess.run([*_simulation(arguments), "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise UserError("the plan could not be checked: launch.simulate says above why")
    return {"check": json.loads(done.stdout)}, done.returncode


def _simulation(arguments: argparse.Namespace) -> list[str]:
    """Return the command that simulates a rank of each kind of this job."""
    command = [sys.executable, "-m", "launch.simulate", *arguments.overrides, "--gpus", str(arguments.gpus), "--brief"]
    if arguments.document_tokens is not None:
        command += ["--document-tokens", str(arguments.document_tokens)]
    return [*command, "--scored-share", str(arguments.scored_share)]


if __name__ == "__main__":
    main()
