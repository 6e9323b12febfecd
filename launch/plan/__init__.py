"""What a run will take: memory, FLOPs, time, communication, checkpoints; and which layouts are fastest."""
