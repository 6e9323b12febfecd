"""What the commands that decode an export share: their decoding options, and prompts from files. No torch here."""
