"""Make the quickstart's inputs: text and chats of Python's standard library, and a toy Ministral 3 checkpoint.

The checkpoint has the format of the released 3B base model and is written by transformers itself: a vision-language
wrapper around the text decoder, YaRN with llama-4 query scaling, head tied to the embedding, bf16.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

from conf.schema import DataConfig, ModelConfig, RunConfig
from conf.system.atomic import atomic_directory, atomic_write_text
from data_pipeline.prepare.run import prepare_sources
from data_pipeline.storage.tokens import StoredTokens
from data_pipeline.toy.corpus import load_docstring_chats, load_standard_library, write_jsonl
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer, unigram_entropy
from launch.quickstart.folder import QuickstartFolder

PAD_TOKEN_ID = 11  # as released; an importer must not take it for a padding row of the embedding
IMAGE_TOKEN_ID = 14


def prepare_data(config: RunConfig, chats: DataConfig, folder: QuickstartFolder) -> None:
    """Train the tokenizer; write texts and chats, their tokens, and the unigram entropy of the held-out text.

    config: of a stage that trains on texts. chats: data of the stage that trains on chats.
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


def write_start_checkpoint(model: ModelConfig, tokenizer_dir: Path, directory: Path, seed: int) -> None:
    """Write random weights of the text dimensions `model`, a tiny vision tower and the tokenizer's files."""
    torch.manual_seed(seed)
    wrapper = Mistral3ForConditionalGeneration(build_wrapper_config(model)).bfloat16()
    with atomic_directory(directory, replace=True) as partial:
        wrapper.save_pretrained(partial)
        for path in sorted(tokenizer_dir.iterdir()):
            shutil.copy(path, partial / path.name)


def build_wrapper_config(model: ModelConfig) -> Mistral3Config:
    """Build the config of the vision-language wrapper.

    Both places that can tie the head to the embedding say so, as in the released 3B.
    """
    return Mistral3Config(
        text_config=build_text_config(model).to_dict(),
        vision_config=build_vision_config().to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=True,
    )


def build_text_config(model: ModelConfig) -> Ministral3Config:
    """Build the config of the text decoder: the dimensions of `model` under transformers' names."""
    rope = asdict(model.rope)
    return Ministral3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.rms_norm_eps,
        initializer_range=model.init_std,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={"rope_type": "yarn", "type": "yarn", "rope_theta": rope.pop("theta"), **rope},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD_TOKEN_ID,
    )


def build_vision_config() -> PixtralVisionConfig:
    """Build the config of a vision tower of a few thousand parameters, which an importer must skip."""
    return PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=14,
        image_size=56,
    )
