"""Watches a run through its folder, without torch and without writing there: `python -m pretrain.monitor RUN`."""
