"""Loads exports and their draft adapters, and knows which code files are shipped with them."""
