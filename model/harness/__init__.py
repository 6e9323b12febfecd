"""Runs lm-evaluation-harness on an export in any decoding mode: `python -m model.harness`."""
