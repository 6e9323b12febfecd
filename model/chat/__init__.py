"""Chats with an exported checkpoint in the terminal: `python -m model.chat DIR`. See README.md."""
