"""The model's entry points: the released ones with their signatures, and the habits of transformers' `generate`."""

from typing import Any

from torch import Tensor

from .decoding_nemotron_labs_diffusion import decode
from .options_nemotron_labs_diffusion import DecodeOptions

# What callers of any model pass; nothing here depends on it.
IGNORED = ("token_type_ids", "pad_token_id", "use_cache")


class DecodingEntryPoints:
    """Methods of NemotronLabsDiffusionModel. Each takes further fields of DecodeOptions by keyword (see there).

    Raises (all of them):
        ValueError: prompts or options that cannot be decoded.
        TypeError: an option that does not exist.
    """

    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        temperature: float = DecodeOptions.temperature,
        eos_token_id: int | list[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode one token per forward. See `decode_ar`; returns (output_ids with the prompt, number of forwards)."""
        given = options | {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": eos_token_id}
        return self._decode("ar", prompt_ids, attention_mask, given)

    def generate(
        self,
        prompt_ids: Tensor | None = None,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        threshold: float | None = None,
        causal_context: bool = DecodeOptions.causal_context,
        temperature: float | None = None,
        eos_token_id: int | list[int] | None = None,
        *,
        mode: str = "block_diffusion",
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """Decode in any mode (ar, block_diffusion, linear, quadratic); returns (output_ids with the prompt, forwards).

        Takes what a tokenizer returns: `generate(**tokenizer(text, return_tensors="pt"), mode="linear")`.
        temperature: None is 0, or 1 with do_sample=True; do_sample=False is greedy whatever the temperature.
        return_dict_in_generate: return the DecodeResult instead.
        """
        if (prompt_ids is None) == (input_ids is None):
            raise ValueError("give the prompts once, as prompt_ids or as input_ids")
        given = {name: value for name, value in options.items() if name not in IGNORED} | {
            "max_new_tokens": max_new_tokens,
            "block_length": block_length,
            "threshold": threshold,
            "causal_context": causal_context,
            "temperature": _resolve_temperature(temperature, do_sample),
            "eos_token_id": eos_token_id,
        }
        prompts: Any = input_ids if prompt_ids is None else prompt_ids
        if return_dict_in_generate:
            return decode(self, mode, prompts, _make_options(given), attention_mask)
        return self._decode(mode, prompts, attention_mask, given)

    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        temperature: float = DecodeOptions.temperature,
        mask_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        threshold: float | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode by linear self-speculation. See `decode_linear_speculation`; returns (output_ids, forwards)."""
        given = options | {
            "max_new_tokens": max_new_tokens,
            "block_length": block_length,
            "temperature": temperature,
            "mask_token_id": mask_token_id,
            "eos_token_id": eos_token_id,
            "threshold": threshold,
        }
        return self._decode("linear", prompt_ids, attention_mask, given)

    def quadratic_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = DecodeOptions.max_new_tokens,
        block_length: int | None = None,
        temperature: float = DecodeOptions.temperature,
        mask_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        threshold: float | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, int]:
        """Decode by quadratic self-speculation. See `decode_quadratic_speculation`; returns (output_ids, forwards)."""
        given = options | {
            "max_new_tokens": max_new_tokens,
            "block_length": block_length,
            "temperature": temperature,
            "mask_token_id": mask_token_id,
            "eos_token_id": eos_token_id,
            "threshold": threshold,
        }
        return self._decode("quadratic", prompt_ids, attention_mask, given)

    def _decode(
        self, mode: str, prompt_ids: Tensor, attention_mask: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, int]:
        result = decode(self, mode, prompt_ids, _make_options(given), attention_mask)
        return result.output_ids, result.num_forwards


def _make_options(given: dict[str, Any]) -> DecodeOptions:
    """TypeError naming the options that do not exist."""
    known = DecodeOptions.__dataclass_fields__
    if unknown := sorted(given.keys() - known.keys()):
        raise TypeError(f"there is no option {', '.join(unknown)}: these models take {', '.join(known)}")
    return DecodeOptions(**given)


def _resolve_temperature(temperature: float | None, do_sample: bool | None) -> float:
    if do_sample is False:
        return 0.0
    return temperature if temperature is not None else float(bool(do_sample))
