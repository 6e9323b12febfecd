"""Keeps what libraries tell their own developers off the quickstart's terminal."""

import os

from conf.system import entry


def quiet_libraries() -> None:
    """Call before importing megatron-core or transformers. Nothing here hides what this project says."""
    entry.quiet_libraries()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if installed, warns that it found no other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
