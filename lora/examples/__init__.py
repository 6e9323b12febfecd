"""The text that is drafted in: from what the user gives to numbered examples.

records.py          .jsonl and .parquet records -> tokens on disk, once
stored_examples.py  tokens on disk -> examples: windows of texts, beginnings of chats
prompts.py          examples, or a prompt per record -> prompts that the model responds to
responses.py        prompts -> responses, decoded once and cached (response_cache.py) -> examples
run_examples.py     all of it for one run: opened, split into training and held-out, responded to
example_set.py      what an example is; splitting, choosing and ordering examples
"""
