"""Attention of the tri-mode model.

visibility decides who sees whom; plan chooses how attention is computed, once per forward, and holds the module that
every layer calls; tiled, grouped (both CPU) and flex (CUDA) compute it; rotation turns queries and keys; context deals
positions to context-parallel ranks.
"""
