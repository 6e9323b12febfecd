"""Talking to an exported checkpoint in the terminal: `python -m model.chat DIR`."""
