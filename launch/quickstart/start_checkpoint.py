"""Phase 2: a toy Ministral 3 in the format of the released 3B base model, made by transformers itself.

A vision-language wrapper around the text decoder, YaRN with llama-4 query scaling, head tied to the embedding, bf16.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

from conf.schema import ModelConfig
from conf.system.atomic import atomic_directory

PAD_TOKEN_ID = 11  # as released; an importer must not take it for a padding row of the embedding
IMAGE_TOKEN_ID = 14


def write_start_checkpoint(model: ModelConfig, tokenizer_dir: Path, directory: Path, seed: int) -> None:
    """Random weights of the text dimensions `model`, a tiny vision tower and the tokenizer's files in `directory`."""
    torch.manual_seed(seed)
    wrapper = Mistral3ForConditionalGeneration(build_wrapper_config(model)).bfloat16()
    with atomic_directory(directory, replace=True) as partial:
        wrapper.save_pretrained(partial)
        for path in sorted(tokenizer_dir.iterdir()):
            shutil.copy(path, partial / path.name)


def build_wrapper_config(model: ModelConfig) -> Mistral3Config:
    """Config of the vision-language wrapper; both places that can tie the head say so, as in the 3B."""
    return Mistral3Config(
        text_config=build_text_config(model).to_dict(),
        vision_config=build_vision_config().to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=True,
    )


def build_text_config(model: ModelConfig) -> Ministral3Config:
    """transformers' names for the dimensions of `model`."""
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
    """A vision tower of a few thousand parameters: importing must skip it, nothing more."""
    return PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=14,
        image_size=56,
    )
