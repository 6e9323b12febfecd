"""Configuration of an exported tri-mode checkpoint (`config.json` with model_type nemotron_labs_diffusion)."""

from typing import Any

from transformers import PretrainedConfig
from transformers.utils.versions import require_version

OLDEST_VERSIONS = {"transformers": "4.57", "torch": "2.5"}
# Before anything else: with an older version the files that need it would fail one by one, in other words.
for _name, _oldest in OLDEST_VERSIONS.items():
    require_version(f"{_name}>={_oldest}", f"This checkpoint's code needs it: pip install -U {_name}")

REQUIRED_ROPE_KEYS = ("rope_theta", "factor", "original_max_position_embeddings", "llama_4_scaling_beta")


def default_rope_parameters() -> dict[str, Any]:
    """Return the rotary embedding of the released 3B and 8B instruct models."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }


class NemotronLabsDiffusionConfig(PretrainedConfig):
    """Dimensions, rotary embedding and diffusion settings of one checkpoint.

    Sizes are counts or widths. Unknown keys become attributes, so configs released with more of them load.

    Attributes:
        head_dim: independent of hidden_size / num_attention_heads.
        rope_parameters: YaRN, `factor` taken literally; `truncate` (optional, true) rounds the correction range;
            `llama_4_scaling_beta` scales queries by 1 + beta * log(1 + floor(position /
            original_max_position_embeddings)).
        mask_token_id: id of the mask token; decoding never emits it.
        block_size: tokens per diffusion block.
        dlm_paradigm, dlm_loss_weight, ar_loss_weight, dp_varying_mask_ratio: say how the checkpoint was trained, for
            other software that reads them; nothing here depends on them.

    Raises:
        ValueError: the keys describe a model this code does not compute (tied head, biases, another activation, a
            sliding window, rotary embedding other than YaRN, incomplete rope_parameters, heads that do not divide into
            groups).
    """

    model_type = "nemotron_labs_diffusion"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (declared so by the base class)
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "max_position_embeddings", "type"}  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 131072,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 34,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 262144,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        tie_word_embeddings: bool = False,
        mask_token_id: int = 100,
        block_size: int = 32,
        dlm_paradigm: str = "bidirectional",
        dlm_loss_weight: float = 0.3,
        ar_loss_weight: float = 1.0,
        dp_varying_mask_ratio: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.dlm_paradigm = dlm_paradigm
        self.dlm_loss_weight = dlm_loss_weight
        self.ar_loss_weight = ar_loss_weight
        self.dp_varying_mask_ratio = dp_varying_mask_ratio
        self.sliding_window = sliding_window
        kwargs.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        if "rope_scaling" in kwargs:
            raise ValueError(
                "rope_scaling is the older name of rope_parameters: rename it, and move rope_theta into it"
            )
        super().__init__(**kwargs, tie_word_embeddings=tie_word_embeddings)  # pyright: ignore[reportCallIssue]
        # Set last: the base class of transformers 5.0 to 5.9 would complain of llama_4_scaling_beta. Checked below.
        self.rope_parameters = rope_parameters if rope_parameters is not None else default_rope_parameters()
        _check_architecture(self)
        _check_rope(self.rope_parameters)


def _check_architecture(config: NemotronLabsDiffusionConfig) -> None:
    """Raise ValueError unless the keys describe the one architecture of this family."""
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings is true, but this format stores the head as diffusion_head.weight")
    if config.attention_bias or config.mlp_bias:
        raise ValueError("attention_bias and mlp_bias must be false: the projections of this family have no biases")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {config.hidden_act!r}, but the MLP of this family is SwiGLU ('silu')")
    if config.sliding_window is not None:
        raise ValueError(f"sliding_window is {config.sliding_window}, but attention of this family has no window")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )


def _check_rope(rope: dict[str, Any]) -> None:
    """Raise ValueError unless `rope` is a complete YaRN description; a guessed value would be another model."""
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type != "yarn":
        raise ValueError(f"rope_parameters has rope_type {rope_type!r}; this family uses 'yarn'")
    missing = [key for key in REQUIRED_ROPE_KEYS if rope.get(key) is None]
    if missing:
        raise ValueError(f"rope_parameters lacks {', '.join(missing)}: copy the value the checkpoint was trained with")


# save_pretrained then writes auto_map and copies this file, so every saved directory loads by itself.
NemotronLabsDiffusionConfig.register_for_auto_class()
