"""Tiny Ministral 3 checkpoints in the released formats, made with transformers' own classes, and their tokenizer.

Every trait of the family at toy size: grouped heads, q width != hidden size, YaRN and query scaling that are active
within the first hundred positions, an image encoder that the text model must skip.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
)

from conf.schema import ModelConfig, RopeConfig, VisionConfig

MASK_TOKEN = "<SPECIAL_100>"
MASK_TOKEN_ID = 100
VOCAB_SIZE = 384
ORIGINAL_MAX_POSITIONS = 32
TINY_VISION = VisionConfig(num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, image_size=56)

Spelling = Literal["vision", "transformers5", "text"]


def tiny_model_config(**changes: Any) -> ModelConfig:
    """Return the ModelConfig of the checkpoints below. `factor` and other fields of RopeConfig may be given too."""
    rope = {"factor": 16.0, "original_max_position_embeddings": ORIGINAL_MAX_POSITIONS}
    rope |= {key: changes.pop(key) for key in list(changes) if key in RopeConfig.__dataclass_fields__}
    dimensions: dict[str, Any] = {
        "name": "tiny",
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 1024,
    }
    return ModelConfig(**(dimensions | changes), rope=RopeConfig(**rope))


def make_text_config(model: ModelConfig, tied: bool) -> Ministral3Config:
    """Return the transformers configuration of the text model `model`."""
    rope = model.rope
    return Ministral3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.rms_norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=11,
        rope_parameters={
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "max_position_embeddings": model.max_position_embeddings,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "truncate": rope.truncate,
            "llama_4_scaling_beta": rope.llama_4_scaling_beta,
        },
    )


def make_ministral3_vlm(
    directory: Path | str,
    *,
    model: ModelConfig | None = None,
    tied: bool = True,
    spelling: Spelling = "vision",
    factor: float = 16.0,
    shards: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: bool = True,
    vision: VisionConfig | None = None,
) -> PreTrainedModel:
    """Save a checkpoint with random weights and return the transformers model that was saved (in `dtype`).

    model: dimensions (default: tiny_model_config(factor=factor)). tied: the head is the embedding, as in the 3B.
    spelling: `vision` (the releases), `transformers5` (new names of the same wrapper) or `text` (no image encoder).
    shards: several files and an index. tokenizer: put a tiny one beside the weights. vision: the tower's dimensions.
    """
    torch.manual_seed(seed)
    text_config = make_text_config(model or tiny_model_config(factor=factor), tied)
    if spelling == "text":
        network: Any = Ministral3ForCausalLM(text_config)
    else:
        network = Mistral3ForConditionalGeneration(_wrap(text_config, tied, vision or TINY_VISION))
    _randomise_norms(network)
    network.to(dtype)
    size = sum(weight.nbytes for weight in network.parameters())
    options: dict[str, Any] = {"max_shard_size": size // 5} if shards else {}
    if spelling == "transformers5":
        options["save_original_format"] = False
    network.save_pretrained(directory, **options)
    if tokenizer:
        save_tiny_tokenizer(directory, vocab_size=min(VOCAB_SIZE, text_config.vocab_size))
    return network


def _wrap(text_config: Ministral3Config, tied: bool, vision: VisionConfig) -> Mistral3Config:
    vision_config: Any = PixtralVisionConfig
    tower = vision_config(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        head_dim=vision.head_dim,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        hidden_act="silu",
    )
    return Mistral3Config(
        text_config=text_config.to_dict(),
        vision_config=tower.to_dict(),
        image_token_index=10,
        spatial_merge_size=2,
        tie_word_embeddings=tied,
    )


def _randomise_norms(network: PreTrainedModel) -> None:
    """Randomise the norms: transformers starts every one at one, which would hide a swapped pair."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)


def save_tiny_tokenizer(directory: Path | str, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Save a byte-level BPE with the family's reserved ids.

    1 and 2 begin and end text, 10 and 11 begin and end a ChatML message, 100 is the mask.
    """
    named = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
    special = [named.get(i, f"<SPECIAL_{i}>") for i in range(MASK_TOKEN_ID + 1)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if vocab_size >= VOCAB_SIZE else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def add(first, second):\n    return first + second\n"] * 4, trainer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return tokenizer


def write_text_checkpoint(directory: Path | str, model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an untied text checkpoint of any size, one shard per layer, without holding the model in memory."""
    directory = Path(directory)
    config = make_text_config(model, tied=False)
    config.architectures = ["Ministral3ForCausalLM"]
    config.save_pretrained(directory)
    save_tiny_tokenizer(directory)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Ministral3ForCausalLM(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".layers.")[-1].split(".")[0] if ".layers." in name else name, []).append(name)
    file_of = {}
    for i, names in enumerate(groups.values(), 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        weights = {name: torch.empty(shapes[name], dtype=dtype).normal_(std=0.02) for name in names}
        save_file(weights, directory / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def count_chunks(step_dir: Path) -> int:
    """Count the stored chunks of all tensors of a step directory: they show the layout it was written for."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    stored = FileSystemReader(step_dir).read_metadata().state_dict_metadata.values()
    return sum(len(value.chunks) for value in stored if isinstance(value, TensorStorageMetadata))
