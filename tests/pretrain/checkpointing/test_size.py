"""The size of a checkpoint from the configuration; tests/distributed/test_checkpoint.py compares it with real ones."""

from transformers import Ministral3ForCausalLM

from conf.schema import Dtype
from pretrain.checkpointing.size import compute_checkpoint_bytes
from tests.helpers.tiny_checkpoints import make_text_config, tiny_model_config


def test_parameters_are_those_of_transformers_model() -> None:
    model = tiny_model_config()
    network = Ministral3ForCausalLM(make_text_config(model, tied=False))
    assert model.num_parameters == sum(parameter.numel() for parameter in network.parameters())


def test_optimizer_state_is_fp32_whatever_the_weights_are() -> None:
    model = tiny_model_config()
    saved = compute_checkpoint_bytes(model, Dtype.fp32) - compute_checkpoint_bytes(model, Dtype.bf16)
    assert abs(saved - 2 * 1.01 * model.num_parameters) <= 2
