"""Run code for a GPU on a machine without one: traced, lowered and compiled, but not executed."""
