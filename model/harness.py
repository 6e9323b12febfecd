"""Standard tasks in any decoding mode: lm-evaluation-harness with a model of its own kind.

    python -m model.harness run --model tri_mode --model_args pretrained=DIR,mode=quadratic --tasks gsm8k

Everything but the model is lm-evaluation-harness's own command line (`python -m model.harness run --help`). Generated
answers are decoded in the mode asked for. Likelihoods (multiple choice, perplexity) are AR's in every mode: that is the
distribution that speculation keeps, and block diffusion assigns none. Needs lm_eval (extra `evaluation`).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.entry import exit_status
from conf.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    sys.exit(f"error: lm-evaluation-harness is not installed ({error}): pip install 'tri-mode[evaluation]'")
import torch
from torch import Tensor

from model.draft_adapter import ADAPTER_FOLDER
from model.hf.adapter_nemotron_labs_diffusion import DraftAdapter
from model.hf.decoding_nemotron_labs_diffusion import MODES, decode
from model.hf.options_nemotron_labs_diffusion import DecodeOptions
from model.load import attach_adapter, find_stop_ids, load_export, load_tokenizer

SAMPLING_KEYS = ("temperature", "top_k", "top_p")
HuggingFaceLM: Any = HFLM  # its decorator hides its type


@register_model("tri_mode")
class TriModeLM(HuggingFaceLM):
    """An export as lm-evaluation-harness sees it: loaded by this repository's classes, decoded in one mode."""

    def __init__(
        self,
        pretrained: str,
        mode: str = "ar",
        adapter: str | bool = True,
        dtype: str | None = None,
        device: str | None = None,
        block_length: int | None = None,
        threshold: float | None = None,
        mask_groups: int | None = None,
        thinking_budget: int | None = None,
        seed: int | None = None,
        **harness_options: Any,
    ) -> None:
        """pretrained: folder of an export. mode: ar, block_diffusion, linear or quadratic.

        adapter: true uses the draft adapter in the export where there is one, false none, a path that one.
        dtype: bf16 or fp32; None is bf16 on a GPU and fp32 on a CPU. The others: as in DecodeOptions.
        harness_options: those of HFLM that concern no loading (batch_size, max_length, think_end_token, ...).

        Raises: UserError for a folder that is no export, an unknown mode, or an adapter that does not fit.
        """
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
        directory = Path(pretrained)
        if not torch.cuda.is_available():
            device = None  # the harness's own default is cuda:0, and it too goes on without one
        model = load_export(directory, dtype=dtype, device=device)
        _attach(model, directory, adapter)
        super().__init__(pretrained=model, tokenizer=load_tokenizer(directory), backend="causal", **harness_options)  # pyright: ignore[reportArgumentType]
        self._directory, self._mode = directory, mode
        self._options = DecodeOptions(
            block_length=block_length,
            threshold=threshold,
            mask_groups=mask_groups,
            thinking_budget=thinking_budget,
            seed=seed,
            eos_token_id=find_stop_ids(model),
        )
        self._adapter = DraftAdapter(model)
        self._num_tokens = self._num_forwards = 0

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of the verifier: PEFT would apply a draft adapter to every row."""
        with self._adapter.suspended():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **given: Any
    ) -> Tensor:
        """Decode context [B, P] to at most max_length tokens in all; texts in `stop` are cut off by the harness."""
        options = replace(self._options, max_new_tokens=max_length - context.shape[1], **_read_sampling(given))
        result = decode(self.model, self._mode, context, options, attention_mask)
        self._num_tokens += sum(result.num_new_tokens)
        self._num_forwards += result.num_forwards * len(context)
        return result.output_ids

    def get_model_info(self) -> dict[str, Any]:
        """Joins the results: what was decoded how, and at how many tokens per forward (None without an answer)."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "model_num_parameters": parameters,
            "model_dtype": str(self.model.dtype),
            "checkpoint": str(self._directory),
            "mode": self._mode,
            "new_tokens": self._num_tokens,
            "tokens_per_forward": self._num_tokens / self._num_forwards if self._num_forwards else None,
        }


def _attach(model: Any, directory: Path, adapter: str | bool) -> None:
    """Attach the adapter asked for. Raises: UserError if it is not there or does not fit."""
    own = directory / ADAPTER_FOLDER
    if isinstance(adapter, str):
        attach_adapter(model, Path(adapter))
    elif adapter and own.is_dir():
        attach_adapter(model, own)


def _read_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of DecodeOptions from a task's generation arguments. Raises: UserError for those no mode has."""
    do_sample = given.pop("do_sample", None)
    sampling = {key: given.pop(key) for key in SAMPLING_KEYS if given.get(key) is not None}
    if given:
        raise UserError(f"the task asks for {', '.join(sorted(given))}, which no decoding mode has: use --gen_kwargs")
    if do_sample is False:
        return {}
    return {"temperature": 1.0 if do_sample else 0.0} | sampling


def main() -> int:
    """lm-evaluation-harness's command line. Returns the exit status; 2 after one message for bad input."""
    torch.set_grad_enabled(False)
    return exit_status(lambda: cli_evaluate() or 0)


if __name__ == "__main__":
    sys.exit(main())
