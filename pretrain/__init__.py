"""Trains the AR, joint and SFT stages on megatron-core."""
