"""Verifying an exported checkpoint before it is handed on or trusted: `python -m model.verify_export DIR`."""
