"""Phase 1: the sources of Python's standard library, tokenised."""

import json

from conf.atomic import atomic_write_text
from conf.schema import RunConfig
from data_pipeline.jsonl import write_jsonl
from data_pipeline.prepare.run import prepare_sources
from data_pipeline.standard_library import load_standard_library
from data_pipeline.stored import StoredTokens
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer
from data_pipeline.unigram import unigram_entropy
from launch.quickstart.folder import QuickstartFolder


def prepare_data(config: RunConfig, folder: QuickstartFolder) -> None:
    """Trains the tokenizer, writes training and held-out tokens and the unigram entropy of the latter."""
    texts = load_standard_library()
    save_tokenizer(train_tokenizer(texts.train, config.model.vocab_size), folder.tokenizer)
    folder.text.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", texts.train), ("heldout", texts.heldout)):
        write_jsonl(({"text": document} for document in documents), folder.text / f"{name}.jsonl")
    prepare_sources(config.data)
    train, heldout = StoredTokens(folder.train_data), StoredTokens(folder.heldout_data)
    vocab_size = config.model.vocab_size
    entropy = unigram_entropy(train.count_tokens(vocab_size), heldout.count_tokens(vocab_size))
    values = {"unigram_entropy": entropy, "train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens}
    atomic_write_text(folder.unigram, json.dumps(values, indent=2) + "\n")
