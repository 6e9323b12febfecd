"""Keeps what libraries tell their own developers off the quickstart's terminal."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before importing megatron-core or transformers. Nothing here hides what this project says."""
    warnings.filterwarnings("ignore", module=r"megatron\b")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if installed, warns that it found no other
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
