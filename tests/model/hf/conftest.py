"""Tiny models in the exported format, and transformers' own Ministral 3 with the same weights."""

from typing import Any

import pytest
import torch
from transformers import Ministral3Config, Ministral3ForCausalLM

from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from tests.helpers.tiny_exports import TINY, TINY_ROPE, spread_norms
from tests.model.hf.trained_models import Trained


def make_config(rope=None, **overrides):
    """Make a config of 2 layers with head_dim != hidden / heads and weights wide enough for lively decoding."""
    values = {
        **TINY,
        "vocab_size": 64,
        "max_position_embeddings": 384,
        "mask_token_id": 60,
        "eos_token_id": 2,
    }
    return NemotronLabsDiffusionConfig(rope_parameters={**TINY_ROPE, **(rope or {})}, **{**values, **overrides})


def make_model(dtype=torch.float64, seed=0, rope=None, **overrides):
    """Make a random model in eval mode."""
    torch.manual_seed(seed)
    model: Any = NemotronLabsDiffusionModel(make_config(rope, **overrides))
    model = model.to(dtype).eval()
    spread_norms(model)
    return model


def make_reference(model):
    """Build transformers' Ministral3ForCausalLM with the weights of `model`."""
    names = vars(make_config()).keys() & vars(Ministral3Config()).keys() - {"architectures", "dtype", "pad_token_id"}
    values = {name: getattr(model.config, name) for name in names if not name.startswith("_")}
    reference = Ministral3ForCausalLM(Ministral3Config(**values, pad_token_id=None)).to(model.dtype).eval()
    weights = model.state_dict().items()
    rename = {"encoder.": "model.", "diffusion_head.": "lm_head."}
    renamed = {
        next(new + key[len(old) :] for old, new in rename.items() if key.startswith(old)): w for key, w in weights
    }
    reference.load_state_dict(renamed)
    return reference


@pytest.fixture(scope="session")
def tiny():
    """Give the factories tiny.config, tiny.model, tiny.reference."""

    class Tiny:
        config = staticmethod(make_config)
        model = staticmethod(make_model)
        reference = staticmethod(make_reference)

    return Tiny


@pytest.fixture(scope="session")
def trained():
    """Give a model with a good drafter; see Trained."""
    return Trained(make_model)
