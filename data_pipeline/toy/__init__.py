"""Make what the quickstart, benchmarks and tests train on: texts, chats and a tokenizer, without a download."""
