"""The trainer of the AR and joint stages on megatron-core."""
