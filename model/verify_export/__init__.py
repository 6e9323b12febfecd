"""Verifies an exported checkpoint before it is passed on or trusted: `python -m model.verify_export DIR`."""
