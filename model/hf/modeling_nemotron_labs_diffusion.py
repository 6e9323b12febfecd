"""The tri-mode language model: one forward, and an entry point for each way to decode.

`forward` is causal unless asked otherwise, so the usual Hugging Face habits work. Mode and cache are arguments.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_mask import build_visibility
from .cache import PrefixCache
from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from .decision import score_masked_tokens
from .decoding import decode_ar, decode_request, find_decoder
from .layers import NemotronLabsDiffusionEncoder
from .options import BLOCK_DIFFUSION, DecodeOptions
from .quadratic import decode_quadratic_speculation
from .rope import RotaryEmbedding
from .sampling import resolve_temperature
from .session import select_prompts
from .speculation import check_adapter_effect, decode_linear_speculation

Positions = int | slice | Tensor
# What callers of any model pass to generate; nothing here depends on it.
IGNORED = ("token_type_ids", "pad_token_id", "use_cache")


class NemotronLabsDiffusionModel(PreTrainedModel, GenerationMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A Ministral 3 decoder with an untied head that decodes token by token, by blocks, or by self-speculation.

    The methods named `*generate` take the released models' arguments in order, other fields of DecodeOptions by name.
    They raise ValueError for what cannot be decoded or has no effect, TypeError for unknown options.
    """

    config_class = NemotronLabsDiffusionConfig
    encoder_class = NemotronLabsDiffusionEncoder
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NemotronLabsDiffusionLayer"]  # noqa: RUF012 (declared so by the base class)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_dim)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (the same signature, abbreviated)
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a checkpoint as PreTrainedModel does, but refuse one with missing tensors, which it would make up.

        Raises:
            ValueError: the checkpoint lacks tensors; the message names one.
        """
        loaded: Any = super().from_pretrained(  # with output_loading_info a pair, which its annotation does not say
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} lack {len(missing)} of the model's tensors, such as "
                f"{missing[0]}: download or export them again"
            )
        return (model, info) if output_loading_info else model

    def load_adapter(
        self, peft_model_id: Any = None, adapter_name: str | None = None, *rest: Any, **kwargs: Any
    ) -> Any:
        """Load a PEFT adapter; log by how much it changes a draft, and raise ValueError if it changes nothing."""
        loaded = super().load_adapter(peft_model_id, adapter_name, *rest, **kwargs)
        check_adapter_effect(self, adapter_name or "default")
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the vocabulary head."""
        return self.diffusion_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the vocabulary head."""
        self.diffusion_head = new_embeddings

    def embed_prompt(self, prompt_ids: Tensor, attention_mask: Tensor | None = None, **images: Any) -> Tensor | None:
        """Return the embeddings [B, P, hidden] of prompts with images, None without; raise ValueError for any here."""
        if given := [name for name, value in images.items() if value is not None]:
            raise ValueError(f"this checkpoint reads text alone, no images: leave {' and '.join(given)} out")
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Positions = 0,
        bidirectional: bool = False,
        commit: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Compute the logits of N new tokens that follow the T - N cached ones.

        Args:
            input_ids: [B, N]; give these or inputs_embeds.
            attention_mask: [B, T] with zeros on padding, or [B or 1, 1, N, T] bool that decides alone who sees whom.
            position_ids: [B or 1, N]; counted from the cached length if not given.
            past_key_values: a PrefixCache (or, with commit=True, transformers' DynamicCache) to read and extend.
            inputs_embeds: [B, N, hidden].
            labels: [B, N] next-token targets as in every causal LM (shifted here, -100 ignored); gives `loss`.
            use_cache: True starts a PrefixCache when none is given.
            logits_to_keep: positions that reach the vocabulary head: an int takes the last ones (0: all), a slice or
                a 1D tensor of indices selects them, a bool mask [B, N] gives flat logits [number of trues, vocab].
            bidirectional: the new tokens see each other both ways; all of them see the cached prefix in either mode.
            commit: False leaves the cache as it is (drafts); True adds the new tokens to it.
            output_hidden_states: return the input of each layer and the normed output.
            output_attentions: not available.
            return_dict: False returns a tuple.

        Raises:
            ValueError: contradictory arguments; the message names them.
        """
        _check_forward(input_ids, inputs_embeds, labels, logits_to_keep, output_attentions)
        hidden = self.encoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        starts_cache = past_key_values is None and use_cache
        cache = PrefixCache(self.config.num_hidden_layers) if starts_cache else past_key_values
        if cache is not None and commit and self.training and self.is_gradient_checkpointing:
            raise ValueError("gradient checkpointing would write the cache twice: pass use_cache=False or commit=False")
        num_cached, num_new = 0 if cache is None else cache.get_seq_length(), hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(num_cached, num_cached + num_new, device=hidden.device)[None]
        visibility = build_visibility(
            attention_mask,
            num_new=num_new,
            num_total=num_cached + num_new,
            bidirectional=bidirectional,
            group_size=self.config.num_attention_heads // self.config.num_key_value_heads,
            device=hidden.device,
        )
        collected: list[Tensor] | None = [] if output_hidden_states else None
        if isinstance(cache, PrefixCache):
            cache.begin(num_new, hidden.device, keeps_graph=commit)
        elif cache is not None and not (commit and isinstance(cache, DynamicCache)):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: give a PrefixCache or, with commit=True, a DynamicCache"
            )
        encoding = self.rotary(position_ids, hidden.dtype)
        hidden = self.encoder(hidden, encoding, visibility, cache, collected=collected)
        if commit and isinstance(cache, PrefixCache):
            cache.advance(num_new)
        logits = self.diffusion_head(select_positions(hidden, logits_to_keep))
        output = CausalLMOutputWithPast(
            loss=None if labels is None else compute_next_token_loss(logits, labels),
            logits=logits,
            past_key_values=cache,  # pyright: ignore[reportArgumentType] (ours has the same methods)
            hidden_states=None if collected is None else tuple(collected),
        )
        return output.to_tuple() if return_dict is False else output

    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        temperature: float = DecodeOptions.temperature,
        eos_token_id: int | list[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode one token per forward (see decode_ar); return (output_ids with the prompt, number of forwards)."""
        options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": eos_token_id}
        options |= {"max_thinking_tokens": max_thinking_tokens, "end_think_token_id": end_think_token_id}
        return decode_request(self, decode_ar, prompt_ids, attention_mask, options).as_pair()

    def generate(
        self,
        prompt_ids: Tensor | None = None,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        threshold: float | None = None,
        causal_context: bool = DecodeOptions.causal_context,
        temperature: float | None = None,
        eos_token_id: int | list[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        mode: str = BLOCK_DIFFUSION,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """Decode in any mode (ar, block_diffusion, linear, quadratic); return (output_ids with the prompt, forwards).

        It takes what a tokenizer returns: `generate(**tokenizer(text, return_tensors="pt"), mode="linear")`.
        temperature: None is 0, or 1 with do_sample=True; do_sample must agree with one that is given.
        return_dict_in_generate: return the DecodeResult instead.
        """
        options = {name: value for name, value in options.items() if name not in IGNORED}
        options |= {"max_new_tokens": max_new_tokens, "block_length": block_length, "threshold": threshold}
        options |= {"causal_context": causal_context, "temperature": resolve_temperature(temperature, do_sample)}
        options |= {"eos_token_id": eos_token_id, "max_thinking_tokens": max_thinking_tokens}
        options |= {"end_think_token_id": end_think_token_id}
        prompt_ids = select_prompts(prompt_ids, input_ids)
        result = decode_request(self, find_decoder(mode), prompt_ids, attention_mask, options)
        return result if return_dict_in_generate else result.as_pair()

    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        temperature: float = DecodeOptions.temperature,
        mask_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode by linear self-speculation (see decode_linear_speculation); return as ar_generate does."""
        options |= {"max_new_tokens": max_new_tokens, "block_length": block_length, "temperature": temperature}
        options |= {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id, "threshold": threshold}
        options |= {"max_thinking_tokens": max_thinking_tokens, "end_think_token_id": end_think_token_id}
        return decode_request(self, decode_linear_speculation, prompt_ids, attention_mask, options).as_pair()

    def quadratic_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        temperature: float = DecodeOptions.temperature,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode by quadratic self-speculation (see decode_quadratic_speculation); return as ar_generate does."""
        options |= {"max_new_tokens": max_new_tokens, "block_length": block_length, "temperature": temperature}
        return decode_request(self, decode_quadratic_speculation, prompt_ids, attention_mask, options).as_pair()

    score_masked = score_masked_tokens  # a method like those above


def select_positions(hidden: Tensor, positions: Positions) -> Tensor:
    """Select the positions of hidden [B, N, hidden] that reach the head, given as logits_to_keep of the forward."""
    if isinstance(positions, int):
        positions = slice(-positions, None) if positions else slice(None)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return hidden[positions]
    return hidden[:, positions]


def compute_next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy of logits [B, N, vocab] at i against labels [B, N] at i + 1; -100 is ignored."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))


def _check_forward(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    logits_to_keep: Positions,
    output_attentions: bool | None,
) -> None:
    """Raise ValueError for arguments that contradict each other or cannot be served."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError("labels need the logits of all positions: leave logits_to_keep at 0")
    if output_attentions:
        raise ValueError("output_attentions is not available: fused attention kernels do not return weights")


# save_pretrained then writes auto_map and copies this file and those it imports.
NemotronLabsDiffusionModel.register_for_auto_class("AutoModel")
