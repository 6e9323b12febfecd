"""`python -m model.convert`."""

import sys

from model.convert.convert import run_convert

sys.exit(run_convert())
