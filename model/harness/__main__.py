"""Run standard tasks in any decoding mode: lm-evaluation-harness with our own kind of model.

    python -m model.harness run --model tri_mode --model_args pretrained=DIR,mode=quadratic --tasks gsm8k

Everything but the model is lm-evaluation-harness's own command line (`python -m model.harness run --help`). Responses
are decoded in the chosen mode. With batch_size=1 (the default) a task's stop strings end them at once; in larger
batches each runs on to a stop token or the length limit. Likelihoods (multiple choice, perplexity) are AR's in every
mode: that is the distribution that speculation preserves, and block diffusion assigns none. Tasks with images run on a
checkpoint that reads them. Needs lm_eval (extra `evaluation`).
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.system.entry import exit_status
from conf.system.errors import UserError

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    sys.exit(f"error: lm-evaluation-harness is not installed ({error}): pip install 'tri-mode[evaluation]'")
import torch
from torch import Tensor

from model.commands.decoding_options import choose_threshold
from model.export.draft_adapter import ADAPTER_FOLDER
from model.export.images import load_image_reader, load_pixels
from model.export.load import attach_adapter, find_stop_ids, find_think_ids, load_export, load_export_tokenizer
from model.harness.images import ImageContext, pad_contexts, score_continuation
from model.harness.stop_strings import StopStringError, StopStrings, StopStringStreamer
from model.hf.decoding import decode
from model.hf.layers import DraftAdapter
from model.hf.options import MODES, DecodeOptions, check_effect, check_options

SAMPLING_KEYS = ("temperature", "top_k", "top_p")
HuggingFaceLM: Any = HFLM  # the decorator hides types
register: Any = register_model


@register("tri_mode")
class TriModeLM(HuggingFaceLM):
    """Presents an export to lm-evaluation-harness: loaded with this repository's classes, decoded in one mode."""

    MULTIMODAL = True  # asked for by tasks with images; ImageContext refuses them for a checkpoint of text alone

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
        verifier_weight: float = 1.0,
        thinking_budget: int | None = None,
        seed: int | None = None,
        **harness_options: Any,
    ) -> None:
        """Load an export.

        Args:
            pretrained: folder of the export.
            mode: ar, block_diffusion, linear or quadratic.
            adapter: true uses the export's own draft adapter if there is one, false none, a path that one.
            dtype: bf16 or fp32; None takes bf16 on a GPU and fp32 on a CPU.
            device: None takes the GPU if there is one.
            block_length: as in DecodeOptions.
            threshold: as in DecodeOptions; None takes 0.9 in block diffusion.
            mask_groups: as in DecodeOptions.
            verifier_weight: as in DecodeOptions.
            thinking_budget: as in DecodeOptions.
            seed: seed of sampling; the i-th prompt of the run adds i, so that repeats of a task differ.
            **harness_options: HFLM's options other than loading (batch_size, max_length, think_end_token, ...).

        Raises:
            UserError: the folder is not an export, the mode is unknown, options cannot be used, or the adapter does
                not fit.
        """
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
        directory = Path(pretrained)
        if not torch.cuda.is_available():
            device = None  # the harness's default is cuda:0, which it also ignores without a GPU
        model = load_export(directory, dtype=dtype, device=device)
        _attach(model, directory, adapter)
        tokenizer = load_export_tokenizer(directory)
        self._read_image, self._pixels = load_image_reader(directory, tokenizer), dict[str, Tensor]()
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **harness_options)  # pyright: ignore[reportArgumentType]
        self._directory, self._mode = directory, mode
        self._options = DecodeOptions(
            block_length=block_length,
            threshold=choose_threshold(mode, threshold),
            mask_groups=mask_groups,
            verifier_weight=verifier_weight,
            thinking_budget=thinking_budget,
            seed=seed,
            eos_token_id=find_stop_ids(model),
        )
        if thinking_budget is not None:
            self._options = replace(self._options, think_token_ids=find_think_ids(self.tokenizer))
        with _as_user_errors():
            check_options(model.config, self._options)
            check_effect(mode, replace(self._options, seed=None))  # each task decides whether to sample
        self._adapter = DraftAdapter(model)
        self._num_prompts = self._num_tokens = self._num_unread = self._num_forwards = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode the responses of requests, with the images of those that show some. Raises: UserError."""
        return super().generate_until([self._see(request) for request in requests], disable_tqdm)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score the continuations of requests by AR; those with images one by one. Raises: UserError."""
        seen = [self._see(request) for request in requests]
        if not any(isinstance(request.args[0], ImageContext) for request in seen):
            return super().loglikelihood(requests, disable_tqdm)
        return [self._score(*request.args) for request in seen]

    def _see(self, request: Any) -> Any:
        """Return a request whose images, if it has any, are part of its context."""
        if len(request.args) < 3:
            return request
        context, given, shown = request.args
        seen = copy.copy(request)
        seen.arguments = (ImageContext.read(context, shown["visual"], self._read_image), given)
        return seen

    def _score(self, context: ImageContext, continuation: str) -> tuple[float, bool]:
        """Return the log-probability of a continuation and whether greedy AR writes it."""
        before, after = self._encode_pair(str(context), continuation)
        tokens = torch.tensor([[*context.expand(before), *after]], device=self.device)
        with self._adapter.suspended():
            output = self.model(tokens, logits_to_keep=len(after) + 1, **load_pixels(context.images))
            logits = output.logits[0, :-1]
        return score_continuation(logits, after)

    def tok_batch_encode(self, strings: Sequence[str], *options: Any, **given: Any) -> tuple[Tensor, Tensor]:
        """Encode prompts as the harness does, those with images with all tokens of these; the next decode sees them."""
        contexts = [string for string in strings if isinstance(string, ImageContext)]
        if not contexts:
            return super().tok_batch_encode(strings, *options, **given)
        self._pixels = load_pixels(image for context in contexts for image in context.images)
        return pad_contexts([context.expand(self.tok_encode(str(context))) for context in contexts])

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Compute the verifier's logits: PEFT would apply a draft adapter to every position."""
        with self._adapter.suspended():
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **given: Any
    ) -> Tensor:
        """Decode context [B, P] to at most max_length tokens in total; the harness itself cuts at texts in `stop`.

        Raises:
            UserError: prompts or generation arguments cannot be decoded.
        """
        options = replace(self._options, max_new_tokens=max_length - context.shape[1], **_read_sampling(given))
        if options.seed is not None:
            options = replace(options, seed=options.seed + self._num_prompts)
        options = options.for_mode(self._mode)
        pixels, self._pixels = self._pixels, {}
        self._num_prompts += len(context)
        stops = self._read_stops(stop)
        with _as_user_errors():
            embeds = self.model.embed_prompt(context, attention_mask, **pixels) if pixels else None
            decode_prompts = self._decode_one if len(context) == 1 else self._decode_batch
            return decode_prompts(context, attention_mask, embeds, options, stops)

    def _decode_one(
        self, context: Tensor, mask: Tensor | None, embeds: Tensor | None, options: DecodeOptions, stops: StopStrings
    ) -> Tensor:
        """Return prompt and response [1, P + T], up to and including the token that completes a stop string."""
        streamer = StopStringStreamer(stops)
        with _count_forwards(self.model) as forwards, suppress(StopStringError):
            decode(self.model, self._mode, context, replace(options, streamer=streamer), mask, embeds)
        self._num_tokens += len(streamer.tokens)
        self._num_forwards += len(forwards)
        return torch.cat((context, context.new_tensor([streamer.tokens])), dim=1)

    def _decode_batch(
        self, context: Tensor, mask: Tensor | None, embeds: Tensor | None, options: DecodeOptions, stops: StopStrings
    ) -> Tensor:
        """Return prompts and responses [B, P + T], up to stop tokens and the limit."""
        result = decode(self.model, self._mode, context, options, mask, embeds)
        responses = result.output_ids[:, context.shape[1] :].tolist()
        for response, length in zip(responses, result.num_new_tokens, strict=True):
            end = stops.find_end(response[:length]) or length
            self._num_tokens += end
            self._num_unread += length - end
        self._num_forwards += result.num_forwards * len(context)
        return result.output_ids

    def _read_stops(self, strings: list[str]) -> StopStrings:
        """Return where the harness will cut; with a think_end_token it only looks after the last one."""
        think_end = self.think_end_token
        if isinstance(think_end, str):
            think_end = self.tokenizer.get_vocab().get(think_end)
            if think_end is None:  # several tokens; the text will be cut when it is complete
                strings = []
        return StopStrings(self.tok_decode, strings, think_end)

    def get_model_info(self) -> dict[str, Any]:
        """Describe what was decoded and at how many tokens per forward; the harness adds it to its results.

        new_tokens counts up to the end of each response, stop token or stop string included. The tokens after stop
        strings are those that a batch wrote until all its responses were done. tokens_per_forward is None if there are
        such tokens, because their forwards cannot be separated from the others.
        """
        is_known = self._num_forwards > 0 and self._num_unread == 0
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "model_num_parameters": parameters,
            "model_dtype": str(self.model.dtype),
            "checkpoint": str(self._directory),
            "mode": self._mode,
            "new_tokens": self._num_tokens,
            "tokens_after_stop_strings": self._num_unread,
            "tokens_per_forward": self._num_tokens / self._num_forwards if is_known else None,
        }


def _attach(model: Any, directory: Path, adapter: str | bool) -> None:
    """Attach the chosen adapter. Raises: UserError if it is missing or does not fit."""
    own = directory / ADAPTER_FOLDER
    if isinstance(adapter, str):
        attach_adapter(model, Path(adapter))
    elif adapter and own.is_dir():
        attach_adapter(model, own)


def _read_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Read fields of DecodeOptions from a task's generation arguments.

    As in the harness, do_sample decides, and without it a temperature above 0 does; top_k below 1 disables top_k.

    Raises:
        UserError: an argument that no decoding mode has.
    """
    do_sample = given.pop("do_sample", None)
    sampling = {key: given.pop(key) for key in SAMPLING_KEYS if given.get(key) is not None}
    if given:
        raise UserError(f"the task asks for {', '.join(sorted(given))}, which no decoding mode has: use --gen_kwargs")
    if do_sample is False:
        return {}
    if sampling.get("top_k", 1) < 1:
        del sampling["top_k"]
    return {"temperature": 1.0 if do_sample else 0.0} | sampling


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turn what the decode loops refuse into messages to users."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}") from None


@contextmanager
def _count_forwards(model: Any) -> Iterator[list[None]]:
    """Yield a list that grows by one with every forward of the model, also in a decode that is cut short."""
    forwards: list[None] = []
    hook = model.encoder.register_forward_hook(lambda *_: forwards.append(None))
    try:
        yield forwards
    finally:
        hook.remove()


def main() -> int:
    """Run lm-evaluation-harness's command line; return the exit status, 2 after one message for bad input."""
    torch.set_grad_enabled(False)
    return exit_status(lambda: cli_evaluate() or 0)


if __name__ == "__main__":
    sys.exit(main())
