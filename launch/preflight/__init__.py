"""Check whether a job can start, before it occupies GPUs: `python -m launch.preflight [overrides]`."""
