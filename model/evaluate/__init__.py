"""Measures every decoding mode of a checkpoint on the user's prompts: `python -m model.evaluate`. See README.md."""
