"""Look at tokenised data: `python -m data_pipeline.inspect PATH --tokenizer DIR`."""

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import DataConfig, OverlongChat, StageConfig, TrainConfig
from conf.system.entry import exit_status, quiet_libraries

if TYPE_CHECKING:
    from data_pipeline.inspect.run import Inspection

DEFAULT_SAMPLES, DEFAULT_POSITIONS = 3, 512
STAGE = "joint"
STAGES_WITH_NOISE = ("joint", "sft")
EXAMPLES = """examples:
  # statistics and three training sequences as the joint stage sees them
  python -m data_pipeline.inspect /tokens/corpus --tokenizer /models/tokenizer

  # one whole sequence of chats, as SFT packs and masks it; `less -R` keeps the colours
  FORCE_COLOR=1 python -m data_pipeline.inspect /tokens/chats --tokenizer /models/tokenizer \\
      --stage sft --sequence-length 16384 --samples 1 --positions 0 | less -R

  # chats with images: a sheet of the pictures of 20 sequences, with what is asked and answered
  python -m data_pipeline.inspect /tokens/images --tokenizer /models/tokenizer --samples 20 --positions 1 \\
      --images sheet.png

  # numbers alone: lengths as a picture, token frequencies, checksums
  python -m data_pipeline.inspect /tokens/corpus --tokenizer /models/tokenizer \\
      --samples 0 --histogram lengths.png --tokens --verify

Sample n is what a run on this data alone reads as its n-th sequence, with that run's noise, if seed, stage and form are
the run's. Like a run it keeps the packing of that form beside the data, for the next time.
"""


def main() -> None:
    """Parse the command line; exit status 2 with one message if something cannot work, 130 after Ctrl-C."""
    arguments = build_parser().parse_args()
    sys.exit(exit_status(lambda: _run(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; what a run configures has the default of conf/schema."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.inspect",
        description="Show a tokenised dataset: counts, lengths, and training sequences with document boundaries, "
        "noise and loss masks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="dataset folder, or the prefix of a .bin/.idx pair")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="what made the data; without it ids are shown")
    parser.add_argument("--mask-token", default=DataConfig.mask_token, help="its text (default: %(default)s)")
    _add_sample_options(parser.add_argument_group("samples"))
    _add_form_options(parser.add_argument_group("form of the training sequences"))
    more = parser.add_argument_group("more")
    more.add_argument("--histogram", type=Path, metavar="FILE.png", help="draw the lengths of documents")
    more.add_argument(
        "--images", type=Path, metavar="FILE.png", help="draw the images of the samples, with their chats"
    )
    more.add_argument("--tokens", action="store_true", help="most frequent tokens, unused vocabulary (reads all data)")
    more.add_argument("--verify", action="store_true", help="compare every shard with its checksum (reads all data)")
    more.add_argument("--plain", action="store_true", help="marks instead of colours, as without a terminal")
    return parser


def _add_sample_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--samples", type=_count, default=DEFAULT_SAMPLES, metavar="N", help="how many (%(default)s)")
    group.add_argument("--first", type=_count, default=0, metavar="N", help="index of the first one (%(default)s)")
    group.add_argument(
        "--positions", type=_count, default=DEFAULT_POSITIONS, metavar="N", help="shown of each, 0: all (%(default)s)"
    )
    group.add_argument("--rows", type=_refuse_renamed, help=argparse.SUPPRESS)
    group.add_argument("--seed", type=int, default=TrainConfig.seed, help="of order and noise (%(default)s)")
    group.add_argument(
        "--stage", default=STAGE, choices=STAGES_WITH_NOISE, help="name of the stage whose noise is drawn (%(default)s)"
    )


def _add_form_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sequence-length",
        type=_positive,
        default=DataConfig.sequence_length,
        metavar="N",
        help="tokens (%(default)s)",
    )
    group.add_argument(
        "--block-size", type=_positive, default=StageConfig.block_size, metavar="N", help="tokens (%(default)s)"
    )
    group.add_argument("--ar", action="store_true", help="as the AR stage packs them: no noise, no padding between")
    group.add_argument("--no-isolate", action="store_true", help="documents see each other")
    group.add_argument("--no-block-padding-loss", action="store_true", help="block padding is not scored")
    group.add_argument(
        "--overlong",
        choices=[rule.value for rule in OverlongChat],
        default=DataConfig.overlong_chats.value,
        help="chats longer than a sequence (%(default)s)",
    )


def _run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from rich.console import Console  # here, so that --help does not wait for torch

    from data_pipeline.inspect.run import run_inspection

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    plain = arguments.plain or console.color_system is None or console.no_color
    if plain:
        console = Console(highlight=False, color_system=None)
    run_inspection(build_inspection(arguments, plain), console)


def build_inspection(arguments: argparse.Namespace, plain: bool) -> "Inspection":
    """Return what the command line asks for. Raises UserError for a form that cannot be."""
    from data_pipeline.inspect.run import Inspection
    from data_pipeline.noise import NoiseSource
    from data_pipeline.packing.form import build_sequence_form

    data = DataConfig(
        mask_token=arguments.mask_token,
        sequence_length=arguments.sequence_length,
        isolate_documents=not arguments.no_isolate,
        block_padding_loss=not arguments.no_block_padding_loss,
        overlong_chats=OverlongChat(arguments.overlong),
    )
    noise = NoiseSource(arguments.seed, arguments.stage, "train", StageConfig.noise_epsilon)
    return Inspection(
        path=arguments.path,
        tokenizer=arguments.tokenizer,
        mask_token=data.mask_token,
        form=build_sequence_form(data, arguments.block_size, has_noise=not arguments.ar),
        seed=arguments.seed,
        noise=None if arguments.ar else noise,
        first=arguments.first,
        samples=arguments.samples,
        positions=arguments.positions,
        count_tokens=arguments.tokens,
        verify=arguments.verify,
        histogram=arguments.histogram,
        images=arguments.images,
        plain=plain,
    )


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return int(text)


def _refuse_renamed(text: str) -> int:
    raise argparse.ArgumentTypeError(f"renamed: give --positions {text}")


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


if __name__ == "__main__":
    main()
