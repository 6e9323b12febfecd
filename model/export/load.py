"""Loads an exported checkpoint with this repository's classes: no code from its directory is executed."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.export.adapter_weights import KEY_PREFIX, read_tensors
from model.export.draft_adapter import check_adapter
from model.export.shipped_code import CONFIG_NAME, NLD_TYPE, VLM_TYPE
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.layers import DraftAdapter
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel
from model.hf.modeling_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMModel
from model.hf.options import resolve_stop_ids
from model.hf.speculation import measure_adapter_effect

MODELS: dict[str, type[NemotronLabsDiffusionModel]] = {
    NLD_TYPE: NemotronLabsDiffusionModel,
    VLM_TYPE: NemotronLabsDiffusionVLMModel,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
THINK_TOKENS = ("<think>", "</think>")
logger = logging.getLogger(__name__)
ATTENTION = "sdpa"  # config.json must not choose: for the name of a hub repository transformers fetches code


def load_export(directory: Path, *, dtype: str | None = None, device: str | None = None) -> NemotronLabsDiffusionModel:
    """Load the model of an export, ours or a released one, in eval mode and without an adapter.

    One that reads images is a NemotronLabsDiffusionVLMModel, whose tower computes in fp32.

    Args:
        directory: folder in the exported format.
        dtype: bf16 or fp32; None takes bf16 on a GPU and fp32 on a CPU.
        device: None takes the GPU if there is one.

    Raises:
        UserError: the directory is not an export, is damaged, or does not fit the device.
    """
    check_export(directory)
    target = resolve_device(device)
    number_type = DTYPES[dtype] if dtype else torch.bfloat16 if target.type == "cuda" else torch.float32
    try:
        model = _load_model(directory, number_type)
        model.to(target).eval()  # pyright: ignore[reportArgumentType] (a wrapped method)
    except torch.OutOfMemoryError:
        raise UserError(f"{directory} does not fit into the memory of {target}: try --device cpu") from None
    return model


def check_export(directory: Path) -> None:
    """Check that config.json, weights and tokenizer of an export are there. Raises: UserError."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: give the folder of an export")
    if (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} is a run: export it first, python -m model.convert --from {directory} --to DIR")
    read_model_type(directory)
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has no weights (*.safetensors): copy or export them again")
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json: put the tokenizer's files there")


def read_model_type(directory: Path) -> str:
    """Read from config.json which of MODELS an export holds. Raises: UserError if it is none of them."""
    path = directory / CONFIG_NAME
    found = read_json_object(path, f"{directory} is not an exported checkpoint: it has no {CONFIG_NAME}")
    if (model_type := found.get("model_type")) not in MODELS:
        raise UserError(
            f"{directory} is not a tri-mode checkpoint: {CONFIG_NAME} has model_type {model_type!r}, "
            f"not {' or '.join(map(repr, MODELS))}"
        )
    return model_type


def load_config(directory: Path) -> NemotronLabsDiffusionConfig:
    """Load config.json of an export without its weights. Raises: UserError if it does not describe such a model."""
    quiet_transformers()
    config_class: Any = MODELS[read_model_type(directory)].config_class
    try:
        return config_class.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint in {directory} cannot be read: {_first_line(error)}") from None


def load_export_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of an export. Raises: UserError if its files are damaged."""
    quiet_transformers()
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust part raises plain Exception
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from None


def check_vocabulary(directory: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that the model does not have. Raises: UserError."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model only {vocab_size}: "
            "it belongs to another model"
        )


def attach_adapter(model: NemotronLabsDiffusionModel, folder: Path) -> None:
    """Attach a draft adapter to a model that has none; the decode loops switch it on for drafts alone.

    By how much it changes the draft of a probe is logged.

    Raises:
        UserError: `folder` holds no draft adapter, one that was made for another checkpoint, or one without effect.
    """
    check_adapter(folder, model.config)
    quiet_transformers()
    tensors = dict(read_tensors(folder))  # under PEFT's names, whoever wrote them
    try:
        report = model.load_adapter(str(folder), adapter_state_dict=tensors, adapter_kwargs={"local_files_only": True})
    except ImportError:
        raise UserError(f"reading the draft adapter {folder} needs peft: install it") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the draft adapter {folder} cannot be used: {_first_line(error)}") from None
    _refuse_other_keys(f"the draft adapter's weights in {folder}", report.missing_keys, report.unexpected_keys)
    _restore_adapter_precision(model, tensors)
    assert DraftAdapter(model), "check_adapter accepts only adapters of o_proj"
    logger.info(f"the draft adapter {folder} {measure_adapter_effect(model)}")


def _restore_adapter_precision(model: NemotronLabsDiffusionModel, tensors: Mapping[str, Tensor]) -> None:
    """Set the adapter's weights again in fp32, as PEFT does; transformers rounds them to the model's dtype."""
    for key, weight in tensors.items():
        layer, _, side = key.removeprefix(KEY_PREFIX).removesuffix(".weight").rpartition(".")
        parameter = model.get_parameter(f"{layer}.{side}.default.weight")
        parameter.data = weight.to(parameter.device, torch.float32)


def find_stop_ids(model: NemotronLabsDiffusionModel) -> tuple[int, ...]:
    """Return the tokens that end a response: those of generation_config.json, else of config.json."""
    return resolve_stop_ids(model, None)


def find_think_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Return the ids of <think> and </think>. Raises: UserError if the tokenizer lacks one."""
    vocabulary = tokenizer.get_vocab()
    for token in THINK_TOKENS:
        if token not in vocabulary:
            raise UserError(f"the checkpoint's tokenizer has no {token}: leave the thinking budget out")
    begin, end = (vocabulary[token] for token in THINK_TOKENS)
    return begin, end


def resolve_device(device: str | None) -> torch.device:
    """Return the device named, else the GPU if there is one, else the CPU. Raises: UserError if it does not exist."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    is_missing_gpu = resolved and resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()
    if resolved is None or resolved.type not in ("cpu", "cuda") or is_missing_gpu:
        raise UserError(f"there is no device {device!r} here: use cpu, cuda or cuda:N")
    return resolved


def quiet_transformers() -> None:
    """Silence transformers: this module reports errors itself, in one message."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _load_model(directory: Path, dtype: torch.dtype) -> NemotronLabsDiffusionModel:
    quiet_transformers()
    try:
        loaded: Any = MODELS[read_model_type(directory)].from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,  # returns two values then, which its annotation does not say
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"the checkpoint in {directory} cannot be read: {_first_line(error)}") from None
    model, report = loaded
    _refuse_other_keys(f"the weights in {directory}", report["missing_keys"], report["unexpected_keys"])
    return model


def _refuse_other_keys(what: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights with other names: missing tensors would be random numbers. Raises: UserError naming an example."""
    for problem, keys in (("lack", sorted(missing)), ("have unknown", sorted(unexpected))):
        if keys:
            raise UserError(f"{what} {problem} {len(keys)} of the model's tensors, such as {keys[0]}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
