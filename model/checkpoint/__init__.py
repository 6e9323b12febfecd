"""What a checkpoint directory holds: its folders, its manifest and the checksums of its files. No torch here."""
