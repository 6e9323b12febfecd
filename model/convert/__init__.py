"""Hugging Face <-> Megatron checkpoints, tensor by tensor. See README.md."""
