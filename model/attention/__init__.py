"""Attention of the tri-mode model: who sees whom (layout), how it is computed (split, flex), and the megatron-core
module that calls it (core). A batch's structure is built once per forward (plan) and passed down as an argument."""
