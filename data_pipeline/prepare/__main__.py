"""Turn text or chats into token shards, on all cores: `python -m data_pipeline.prepare data=web`."""

import argparse
import sys
from pathlib import Path

from conf.composition.compose import compose_data
from conf.system.entry import exit_status
from data_pipeline.prepare.console import print_report
from data_pipeline.prepare.run import prepare_sources

EXAMPLES = """examples:
  # your own text (conf/data/text.yaml): /tokens/train and /tokens/heldout; data.heldout=null holds nothing out
  python -m data_pipeline.prepare data=text data.tokenizer=/models/tokenizer \\
      data.train.text.input.files='/corpus/*.jsonl.zst' data.folder=/tokens

  # your own chats (conf/data/chats.yaml), in the template of the model family
  python -m data_pipeline.prepare data=chats data.tokenizer=/models/tokenizer data.folder=/tokens \\
      data.train.chats.input.files=/chats data.prepare.chat_template=chatml

  # your own configuration group: configs/data/web.yaml
  python -m data_pipeline.prepare --config-dir configs data=web data.prepare.workers=16

The same command continues an interrupted run, and does nothing once the data are complete. Settings are described in
conf/schema/data.py. Records that give no document are listed in <path>/skipped.jsonl.
"""


def main() -> None:
    """Parse the command line; exit status 2 with one message if something cannot work, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description="Tokenise every source of data.train and data.heldout that has an `input` into its `path`.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-dir", type=Path, help="folder of your own groups: DIR/data/<option>.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="data=<option of conf/data> and settings, such as data.tokenizer=..."
    )
    arguments = parser.parse_intermixed_args()
    sys.exit(
        exit_status(
            lambda: print_report(prepare_sources(compose_data(arguments.overrides, arguments.config_dir))),
            interrupted="interrupted: the same command continues from here",
        )
    )


if __name__ == "__main__":
    main()
