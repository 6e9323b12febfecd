"""Makes random models of given sizes, and transformers' own Ministral 3 with the same weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import Ministral3Config, Ministral3ForCausalLM

from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig, default_rope_parameters
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

MASK_TOKEN_ID = 100
ROPE = default_rope_parameters() | {"rope_theta": 1e4, "original_max_position_embeddings": 4096}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, named as in a config of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    initializer_range: float = 0.02
    max_position_embeddings: int = 65536  # 16 x 4096


def make_model(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Make a random model of ours in eval mode. Its head gives the mask token logit 0, which is never the best."""
    torch.manual_seed(seed)
    config = NemotronLabsDiffusionConfig(**asdict(sizes), rope_parameters=dict(ROPE), mask_token_id=MASK_TOKEN_ID)
    model: Any = NemotronLabsDiffusionModel(config)
    model.diffusion_head.weight.data[MASK_TOKEN_ID] = 0  # so that plain AR need not forbid it
    return model.to(dtype).eval()


def make_twin(model: Any, sizes: Sizes) -> Any:
    """Make a Ministral3ForCausalLM of transformers that shares the weights of `model`."""
    config = Ministral3Config(**asdict(sizes), rope_parameters=dict(ROPE), pad_token_id=None)
    twin: Any = Ministral3ForCausalLM(config)
    rename = {"encoder.": "model.", "diffusion_head.": "lm_head."}
    weights = {
        next(new + key.removeprefix(old) for old, new in rename.items() if key.startswith(old)): weight
        for key, weight in model.state_dict().items()
    }
    twin.load_state_dict(weights, assign=True)
    return twin.eval()
