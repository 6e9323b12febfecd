"""Chats to tokens: validated, rendered by a chat template, split where the assistant's answers begin and end."""
