"""Images of chats: checked when data are prepared, stored beside the tokens, decoded by the loader."""
