"""Phase 1: the sources of Python's standard library, tokenised."""

import json

from conf.atomic import atomic_write_text
from conf.schema import RunConfig
from data_pipeline.dataset import TokenDataset
from data_pipeline.prepare import prepare_dataset
from data_pipeline.standard_library import load_standard_library
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer
from data_pipeline.unigram import unigram_entropy
from launch.quickstart.folder import QuickstartFolder


def prepare_data(config: RunConfig, folder: QuickstartFolder) -> None:
    """Trains the tokenizer, writes training and held-out tokens and the unigram entropy of the latter."""
    texts = load_standard_library()
    save_tokenizer(train_tokenizer(texts.train, config.model.vocab_size), folder.tokenizer)
    for documents, prefix in ((texts.train, folder.train_data), (texts.heldout, folder.heldout_data)):
        prepare_dataset(documents, folder.tokenizer, config.data.mask_token, prefix, len(documents))
    train, heldout = (
        TokenDataset(prefix, config.data.sequence_length, config.stage.block_size, seed=0, shuffle=False)
        for prefix in (folder.train_data, folder.heldout_data)
    )
    vocab_size = config.model.vocab_size
    entropy = unigram_entropy(train.count_tokens(vocab_size), heldout.count_tokens(vocab_size))
    values = {"unigram_entropy": entropy, "train_tokens": train.num_tokens, "heldout_tokens": heldout.num_tokens}
    atomic_write_text(folder.unigram, json.dumps(values, indent=2) + "\n")
