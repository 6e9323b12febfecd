"""A run as its folder tells it: `python -m pretrain.monitor RUN`. No torch, and nothing is written into the folder."""
