"""Files shipped inside every exported checkpoint; the project uses the same ones for decoding and for the drafter."""
