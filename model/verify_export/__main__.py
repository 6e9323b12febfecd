"""`python -m model.verify_export`."""

import sys

from model.verify_export.cli import run_verify_export

sys.exit(run_verify_export())
