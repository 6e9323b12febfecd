"""Load an export and its draft adapter as any user would, and measure how it decodes held-out text.

python -m launch.quickstart.decode --export DIR --heldout PREFIX --output FILE
"""

import argparse
import json
import sys
from pathlib import Path

from conf.system.atomic import atomic_write_text
from conf.system.entry import exit_status
from launch.quickstart.phases import hide_library_messages


def main() -> None:
    """Run the command; exit status 2 and one message if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m launch.quickstart.decode", description="Measure an export.")
    parser.add_argument("--export", type=Path, required=True, help="exported Hugging Face directory")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out tokens, as prepare wrote them")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    hide_library_messages()
    from launch.quickstart.measure import run_decoding  # imports torch and transformers

    def measure() -> None:
        values = run_decoding(arguments.export, arguments.heldout)
        atomic_write_text(arguments.output, json.dumps(values, indent=2) + "\n")

    sys.exit(exit_status(measure))


if __name__ == "__main__":
    main()
