"""Predict what a run will take (memory, FLOPs, time, communication, checkpoints) and search the fastest layouts."""
