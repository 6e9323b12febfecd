"""Checks before a job burns GPUs: `python -m launch.preflight [overrides]`."""
