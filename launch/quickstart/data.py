"""Phase 1: the sources of Python's standard library, and chats made of its docstrings, tokenised."""

import json

from conf.schema import DataConfig, RunConfig
from conf.system.atomic import atomic_write_text
from data_pipeline.chat.docstrings import load_docstring_chats
from data_pipeline.prepare.run import prepare_sources
from data_pipeline.standard_library import load_standard_library
from data_pipeline.storage.jsonl import write_jsonl
from data_pipeline.storage.stored import StoredTokens
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer
from data_pipeline.unigram import unigram_entropy
from launch.quickstart.folder import QuickstartFolder


def prepare_data(config: RunConfig, chats: DataConfig, folder: QuickstartFolder) -> None:
    """Trains the tokenizer, writes texts and chats, their tokens, and the unigram entropy of the held-out text.

    config: of a stage on texts. chats: data of the stage on chats.
    """
    texts = load_standard_library()
    save_tokenizer(train_tokenizer(texts.train, config.model.vocab_size), folder.tokenizer)
    docstrings = load_docstring_chats()
    for split in ("train", "heldout"):
        write_jsonl(({"text": text} for text in getattr(texts, split)), folder.text / f"{split}.jsonl")
        write_jsonl(getattr(docstrings, split), folder.text / f"{split}_chats.jsonl")
    for data in (config.data, chats):
        prepare_sources(data)
    train, heldout = StoredTokens(folder.train_data), StoredTokens(folder.heldout_data)
    vocab_size = config.model.vocab_size
    entropy = unigram_entropy(train.count_tokens(vocab_size), heldout.count_tokens(vocab_size))
    values = {"unigram_entropy": entropy, "train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens}
    atomic_write_text(folder.unigram, json.dumps(values, indent=2) + "\n")
