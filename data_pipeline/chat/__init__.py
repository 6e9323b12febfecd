"""Turn chats into tokens: check them, render them by a chat template, cut them where responses begin and end."""
