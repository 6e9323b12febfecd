"""`python -m model.chat`."""

import sys

from model.chat.cli import run_chat

sys.exit(run_chat())
